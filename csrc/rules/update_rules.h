// SPDX-License-Identifier: Apache-2.0
//
// The update rules, for ONE element. Host and device, no torch: this header and
// tiger_ext/reference.py are the only two places where the mathematics is written down.
//
// A rule is a small struct of constants in the arithmetic type T (float, or double for float64
// parameters) with a call operator that advances one parameter element and its state by one step.
// Every operation is a single IEEE operation (multiply-add contraction is off), so all instruction
// sets and devices agree bit by bit, but for a NaN's sign. What else a rule says of itself:
//
//     kStates, kStateNames  its state tensors, as a parameter's state calls them
//     kCountsSteps          whether the state has a counter `step`
//     kHasEps               whether it has the option eps
//     kFamily, fits         what groups and ops call it; rules of one family are forms of one rule,
//                           each for the parameters that fit it
//     kDirected             whether it is one of Momentum, with `update` for its call operator
//     General               the form that the rarer kernels use in its place
//     kRowMoment            if it is there: its last state has one number a row, see AdamWByRow
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TIGER_EXT_INLINE __host__ __device__ __forceinline__
#else
#define TIGER_EXT_INLINE inline __attribute__((always_inline))
#endif

namespace tiger_ext {

// Which rule: its place in the list of rules (rule_list.h).
enum class RuleKind : int8_t {};

// At most so many state tensors.
constexpr int kMaxStates = 2;

// What takes the place of the sign; c is the momentum, kappa the direction's scale.
enum class Direction : int8_t {
  kSign,
  kClip,   // clamp(kappa c, -1, 1)
  kPower,  // sign(c) |c|^kappa
  kAtan,   // 2/pi atan(kappa c)
};

// Over what the learning rate is relative to the parameter's root mean square, if it is.
enum class Scale : int8_t { kNone, kTensor, kRows };

// What a NaN or Inf in the (summed) gradient does.
enum class Nonfinite : int8_t { kPropagate, kSkip, kShrink, kRaise };

// Which rows a strided gradient touches.
enum class Touched : int8_t { kAll, kNonzero, kMasked };

// What becomes of the steps in which a row was not touched.
enum class Lazy : int8_t {
  kFrozen,  // nothing
  kDecay,   // the decay of parameter and state is made up for at the next touch
  kExact,   // so are the steps along the sign of the momentum
};

// What a relative learning rate (Scale) makes of the one that is given, see Facts::rate.
struct Rate {
  double size = 1.0;       // the learning rate is multiplied by it, for the decay too
  double direction = 1.0;  // the direction is multiplied by it

  friend bool operator==(const Rate& a, const Rate& b) = default;
};

struct Stretch;
struct HistoryClock;

// What the rules need to know, in double, independent of the arithmetic type: one per tensor and
// step.
struct RuleParams {
  RuleKind kind{};
  double lr = 0.0;
  double beta1 = 0.0;
  double beta2 = 0.0;
  double eps = 0.0;
  double weight_decay = 0.0;
  double grad_factor = 1.0;       // -1 for maximize, times 1 / grad_scale
  double bias_correction1 = 1.0;  // 1 - beta1^t
  double bias_correction2 = 1.0;  // 1 - beta2^t

  Direction direction = Direction::kSign;
  double direction_scale = 1.0;
  Scale scale = Scale::kNone;
  double rms_floor = 0.0;
  Rate rate;  // if it is one and the same for all elements
  Nonfinite nonfinite = Nonfinite::kPropagate;
  double shrink_ratio = 1.0;
  double shrink_to = 0.0;
  Touched touched = Touched::kAll;

  // Of an accumulation window's micro-step (Tiger only):
  int32_t window = 0;      // its number, from 1; 0: no accumulation
  double micro_steps = 1;  // the gradient counts for one of so many
  bool decays = true;      // the momentum decays, once per window
  bool adds = true;        // there is a gradient
  bool moves = true;       // the parameter moves, once per window

  bool row_moment = false;  // the second moment has one number a row
  bool quantises = false;   // the momentum is stored in int8
  bool rounds = false;      // parameters in half precision are rounded stochastically
  uint64_t seed = 0;        // of what is rounded stochastically
  int64_t first = 0;        // the number of the group's first parameter in the optimizer

  Lazy lazy = Lazy::kFrozen;
  int32_t current = 0;   // in a lazy mode: the step up to which a row is brought before its update
  uint64_t history = 0;  // a number of its own for each state of each history
  const Stretch* stretches = nullptr;  // of the history (history.h)
  int64_t stretch_count = 0;
  const HistoryClock* clock = nullptr;  // on a GPU: has all of the above

  // Whether parameters have a counter for what is rounded stochastically.
  TIGER_EXT_INLINE bool counts_roundings() const { return rounds || quantises; }

  // The step up to which a row is current after its update.
  TIGER_EXT_INLINE int32_t updated() const { return moves ? current + 1 : current; }

  friend bool operator==(const RuleParams& a, const RuleParams& b) = default;

  // Whether each tensor or row must be looked at before it is updated.
  TIGER_EXT_INLINE bool looks() const {
    return scale != Scale::kNone || nonfinite == Nonfinite::kSkip ||
           nonfinite == Nonfinite::kShrink;
  }
};

// The bias corrections of step number t.
TIGER_EXT_INLINE void set_bias_corrections(RuleParams& rule, int64_t t) {
  const double steps = static_cast<double>(t);
  rule.bias_correction1 = 1.0 - std::pow(rule.beta1, steps);
  rule.bias_correction2 = 1.0 - std::pow(rule.beta2, steps);
}

// sign(0) = 0, sign(NaN) = NaN: a row without gradient and momentum does not move, and a NaN is
// never hidden.
template <typename T>
TIGER_EXT_INLINE T sign(T x) {
  const T s = static_cast<T>(x > T(0)) - static_cast<T>(x < T(0));
  return x == x ? s : x;
}

// The largest finite number.
template <typename T>
TIGER_EXT_INLINE constexpr T largest() {
  return static_cast<T>(sizeof(T) == 8 ? 0x1.fffffffffffffp1023 : 0x1.fffffep127);
}

// c's direction; NaN stays NaN.
template <Direction kDirection, typename T>
TIGER_EXT_INLINE T direction_of(T c, T kappa) {
  if constexpr (kDirection == Direction::kSign) {
    return sign(c);
  } else if constexpr (kDirection == Direction::kClip) {
    const T x = kappa * c;
    return x > T(1) ? T(1) : x < T(-1) ? T(-1) : x;
  } else if constexpr (kDirection == Direction::kPower) {
    return sign(c) * std::pow(std::abs(c), kappa);
  } else {
    return static_cast<T>(0.63661977236758134308) * std::atan(kappa * c);
  }
}

// Lion, and Tiger as its special case beta1 == beta2, where the direction is that of the new
// momentum: c and the new m are then the same number, computed by the same operations.
//     c = beta1 m + (1 - beta1) g
//     p = (1 - lr wd) p - lr direction(c)
//     m = beta2 m + (1 - beta2) g
// In an accumulation window beta and p's step count once and the gradient k times, divided by k.
template <typename T>
struct Momentum {
  static constexpr const char* kFamily = "sign_momentum";
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[] = {"exp_avg"};
  static constexpr bool kCountsSteps = false, kHasEps = false, kDirected = true;
  using General = Momentum;
  static constexpr bool fits(const RuleParams&) { return true; }
  T grad_factor, decay, lr, beta1, beta2, weight1, weight2;
  T weight_decay, direction_scale, direction_factor;
  Direction direction;
  bool moves, relative;

  Momentum() = default;
  TIGER_EXT_INLINE explicit Momentum(const RuleParams& r)
      : grad_factor(static_cast<T>(r.grad_factor)),
        decay(static_cast<T>(1.0 - r.lr * r.weight_decay)),
        lr(static_cast<T>(r.lr)),
        beta1(static_cast<T>(r.decays ? r.beta1 : 1.0)),
        beta2(static_cast<T>(r.decays ? r.beta2 : 1.0)),
        weight1(static_cast<T>(r.adds ? (1.0 - r.beta1) / r.micro_steps : 0.0)),
        weight2(static_cast<T>(r.adds ? (1.0 - r.beta2) / r.micro_steps : 0.0)),
        weight_decay(static_cast<T>(r.weight_decay)),
        direction_scale(static_cast<T>(r.direction_scale)),
        direction_factor(T(1)),
        direction(r.direction),
        moves(r.moves),
        relative(r.scale != Scale::kNone) {
    if (relative) scale(r.rate);
  }

  // The rule with a relative learning rate. However large that is, the decay takes no more than
  // all of the parameter.
  TIGER_EXT_INLINE void scale(const Rate& rate) {
    const double scaled = static_cast<double>(lr) * rate.size;
    lr = scaled > static_cast<double>(largest<T>()) ? largest<T>() : static_cast<T>(scaled);
    const T share = lr * weight_decay;
    decay = share > T(1) ? T(0) : T(1) - share;
    direction_factor = static_cast<T>(rate.direction);
  }
  // The rule after the window's first micro-step.
  TIGER_EXT_INLINE void stop_decay() { beta1 = beta2 = T(1); }

  // The direction of one element, before its update.
  template <Direction kDirection>
  TIGER_EXT_INLINE T direction_at(T grad, T m) const {
    return direction_for<kDirection>(beta1 * m + weight1 * (grad_factor * grad));
  }

  template <Direction kDirection, bool kMoves>
  TIGER_EXT_INLINE void update(T grad, T& p, T& m) const {
    const T g = grad_factor * grad;
    const T c = beta1 * m + weight1 * g;
    if constexpr (kMoves) p = decay * p - lr * scaled_direction<kDirection>(c);
    m = beta2 * m + weight2 * g;
  }

  // With a relative learning rate a power does not overflow: it is divided by its size.
  template <Direction kDirection>
  TIGER_EXT_INLINE T direction_for(T c) const {
    const T d = direction_of<kDirection>(c, direction_scale);
    if constexpr (kDirection == Direction::kPower)
      if (relative && std::abs(d) > largest<T>() && std::abs(c) <= largest<T>())
        return std::copysign(largest<T>(), c);
    return d;
  }
  // A sign is of size 1 already.
  template <Direction kDirection>
  TIGER_EXT_INLINE T scaled_direction(T c) const {
    const T d = direction_for<kDirection>(c);
    if constexpr (kDirection == Direction::kSign) return d;
    else return direction_factor * d;
  }

  // Calls f.template operator()<direction>().
  template <typename F>
  TIGER_EXT_INLINE void with_direction(const F& f) const {
    switch (direction) {
      case Direction::kSign:
        return f.template operator()<Direction::kSign>();
      case Direction::kClip:
        return f.template operator()<Direction::kClip>();
      case Direction::kPower:
        return f.template operator()<Direction::kPower>();
      case Direction::kAtan:
        return f.template operator()<Direction::kAtan>();
    }
  }
};

// Whether a rule changes the parameter.
template <typename Rule>
TIGER_EXT_INLINE bool moves_param(const Rule& rule) {
  if constexpr (Rule::kDirected) return rule.moves;
  else return true;
}

// The plain form: sign, no window.
template <typename T>
struct SignMomentum : Momentum<T> {
  static constexpr bool kDirected = false;
  static constexpr bool fits(const RuleParams& r) {
    return r.direction == Direction::kSign && r.window == 0;
  }

  SignMomentum() = default;
  TIGER_EXT_INLINE explicit SignMomentum(const RuleParams& r) : Momentum<T>(r) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p, T& m) const {
    this->template update<Direction::kSign, true>(grad, p, m);
  }
};

// AdamW with bias correction and decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101):
//     m = beta1 m + (1 - beta1) g
//     v = beta2 v + (1 - beta2) g^2
//     p = (1 - lr wd) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
template <typename T>
struct AdamW {
  static constexpr const char* kFamily = "adamw";
  static constexpr int kStates = 2;
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq"};
  static constexpr bool kCountsSteps = true, kHasEps = true, kDirected = false;
  using General = AdamW;
  static constexpr bool fits(const RuleParams& r) { return r.beta1 != 0.0 && !r.row_moment; }
  T grad_factor, decay, step_size, beta1, beta2, one_minus_beta1, one_minus_beta2;
  T sqrt_bias_correction2, eps;

  AdamW() = default;
  TIGER_EXT_INLINE explicit AdamW(const RuleParams& r)
      : grad_factor(static_cast<T>(r.grad_factor)),
        decay(static_cast<T>(1.0 - r.lr * r.weight_decay)),
        step_size(static_cast<T>(r.lr / r.bias_correction1)),
        beta1(static_cast<T>(r.beta1)),
        beta2(static_cast<T>(r.beta2)),
        one_minus_beta1(static_cast<T>(1.0 - r.beta1)),
        one_minus_beta2(static_cast<T>(1.0 - r.beta2)),
        sqrt_bias_correction2(static_cast<T>(std::sqrt(r.bias_correction2))),
        eps(static_cast<T>(r.eps)) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p, T& m, T& v) const {
    const T g = grad_factor * grad;
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * (g * g);
    p = decay * p - step_size * (m / (std::sqrt(v) / sqrt_bias_correction2 + eps));
  }
};

// What nonfinite="shrink" does to a parameter: a step towards `to`.
template <typename T>
struct Shrink {
  static constexpr int kStates = 0;
  static constexpr bool kDirected = false;
  T ratio, to;

  Shrink() = default;
  TIGER_EXT_INLINE explicit Shrink(const RuleParams& r)
      : ratio(static_cast<T>(r.shrink_ratio)), to(static_cast<T>(r.shrink_to)) {}

  TIGER_EXT_INLINE void operator()(T, T& p) const { p = to + ratio * (p - to); }
};

// AdamW with beta1 == 0, RMSprop with bias correction: m is g itself and not stored.
template <typename T>
struct AdamWWithoutMoment1 : AdamW<T> {
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[] = {"exp_avg_sq"};
  using General = AdamWWithoutMoment1;
  static constexpr bool fits(const RuleParams& r) { return !r.row_moment; }

  AdamWWithoutMoment1() = default;
  TIGER_EXT_INLINE explicit AdamWWithoutMoment1(const RuleParams& r) : AdamW<T>(r) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p, T& v) const {
    T m = T(0);
    AdamW<T>::operator()(grad, p, m, v);
  }
};

// AdamW whose second moment is one number for each row, v = beta2 v + (1 - beta2) mean(g^2): all
// elements of the row are divided by the same. `set_moment` comes before the row's elements.
template <typename T>
struct AdamWByRow : AdamW<T> {
  static constexpr bool kRowMoment = true;
  static constexpr int kStates = 1;  // of the parameter's shape
  static constexpr const char* kStateNames[] = {"exp_avg"};
  static constexpr const char* kRowStateName = "exp_avg_sq";
  using General = AdamWByRow;
  static constexpr bool fits(const RuleParams& r) { return r.beta1 != 0.0; }
  T denominator = T(1);

  AdamWByRow() = default;
  TIGER_EXT_INLINE explicit AdamWByRow(const RuleParams& r) : AdamW<T>(r) {}

  // From the mean of the squared gradients, sign and AMP's scale included.
  TIGER_EXT_INLINE T next_moment(T v, double mean) const {
    return this->beta2 * v + this->one_minus_beta2 * static_cast<T>(mean);
  }
  TIGER_EXT_INLINE void set_moment(T v) {
    denominator = std::sqrt(v) / this->sqrt_bias_correction2 + this->eps;
  }

  TIGER_EXT_INLINE void operator()(T grad, T& p, T& m) const {
    const T g = this->grad_factor * grad;
    m = this->beta1 * m + this->one_minus_beta1 * g;
    p = this->decay * p - this->step_size * (m / denominator);
  }
};

// The same with beta1 == 0: nothing but that number is stored.
template <typename T>
struct AdamWByRowWithoutMoment1 : AdamWByRow<T> {
  static constexpr int kStates = 0;
  using General = AdamWByRowWithoutMoment1;
  static constexpr bool fits(const RuleParams&) { return true; }

  AdamWByRowWithoutMoment1() = default;
  TIGER_EXT_INLINE explicit AdamWByRowWithoutMoment1(const RuleParams& r) : AdamWByRow<T>(r) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p) const {
    const T g = this->grad_factor * grad;
    p = this->decay * p - this->step_size * (g / this->denominator);
  }
};

// Whether a rule is one of parameter groups: the others are what a verdict does to a parameter.
template <typename Rule>
constexpr bool kIsOfGroups = requires { Rule::kFamily; };

// Whether one of its states has one number a row.
template <typename Rule>
constexpr bool kHasRowMoment = requires { Rule::kRowMoment; };

// How many states decay: those of the parameter's shape, and that of its rows.
template <typename Rule>
constexpr int kMoments = Rule::kStates + (kHasRowMoment<Rule> ? 1 : 0);

// A row's state `last_step`: the step up to which it is current; -1 minus that if no gradient has
// ever touched it.
TIGER_EXT_INLINE int32_t current_up_to(int32_t last_step) {
  return last_step < 0 ? -1 - last_step : last_step;
}

// What the steps that a row skipped do to each of its elements.
template <typename T>
struct CatchUp {
  T decay = T(1), drift = T(0);
  T factor[2] = {T(1), T(1)};  // of each state
  T floor[2] = {T(0), T(0)};   // below which its magnitude does not fall by the factor alone

  template <bool kDrifts>
  TIGER_EXT_INLINE void param(T& p, T m) const {
    p = decay * p;
    if constexpr (kDrifts) p -= drift * sign(m);
  }
  // A state decays, but never to 0: its sign is what the drift follows.
  template <int k>
  TIGER_EXT_INLINE void state(T& x) const {
    const T y = x * factor[k];
    const T size = std::abs(x);
    const T least = size < floor[k] ? size : floor[k];
    x = std::abs(y) < least ? std::copysign(least, x) : y;
  }
};

// No update: what remains is the catch-up alone.
template <typename T, int kStateCount>
struct NoUpdate {
  static constexpr bool kOnlyCatchesUp = true;
  static constexpr int kStates = kStateCount;
  static constexpr bool kDirected = false;
  template <typename... States>
  TIGER_EXT_INLINE void operator()(T, T&, States&...) const {}
};

// A rule after the catch-up with skipped steps, in the same pass over the row.
template <typename T, typename Rule, bool kDrifts>
struct AfterCatchUp : Rule {
  CatchUp<T> catch_up;

  TIGER_EXT_INLINE AfterCatchUp(const Rule& rule, const CatchUp<T>& catch_up)
      : Rule(rule), catch_up(catch_up) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p) const {
    catch_up.template param<false>(p, T(0));
    Rule::operator()(grad, p);
  }
  TIGER_EXT_INLINE void operator()(T grad, T& p, T& m) const {
    catch_up.template param<kDrifts>(p, m);
    catch_up.template state<0>(m);
    Rule::operator()(grad, p, m);
  }
  TIGER_EXT_INLINE void operator()(T grad, T& p, T& m, T& v) const {
    catch_up.template param<false>(p, m);
    catch_up.template state<0>(m);
    catch_up.template state<1>(v);
    Rule::operator()(grad, p, m, v);
  }
  // Of Momentum. The row catches up also where the micro-step does not move it.
  template <Direction kDirection, bool kMoves>
  TIGER_EXT_INLINE void update(T grad, T& p, T& m) const {
    catch_up.template param<kDrifts>(p, m);
    catch_up.template state<0>(m);
    Rule::template update<kDirection, kMoves>(grad, p, m);
  }
};

template <typename T, typename Rule, bool kDrifts>
TIGER_EXT_INLINE bool moves_param(const AfterCatchUp<T, Rule, kDrifts>&) {
  return true;
}

// What was found in a tensor or row before its update: sums in double over a fixed order of
// elements, so that they are reproducible.
struct Facts {
  double params = 0.0;      // sum of squares
  double directions = 0.0;  // likewise, if the direction is not the sign
  bool finite = true;       // the gradient is

  TIGER_EXT_INLINE void add(const Facts& other) {
    params += other.params;
    directions += other.directions;
    finite = finite && other.finite;
  }

  // The relative learning rate of `count` elements (Su 2023): lr max(RMS(p), floor), along a
  // direction d that is divided by its RMS, which is 1 for the sign. The two stay apart: as the
  // momentum of what has no gradient decays, 1 / RMS(d) grows without bound, and so would the
  // decay of the parameter. RMS(d) counts as no less than the smallest normal float32, below which
  // a direction is more of rounding errors than of anything else: it fades.
  TIGER_EXT_INLINE Rate rate(const RuleParams& r, int64_t count) const {
    const double n = static_cast<double>(count);
    const double squares = params > largest<double>() ? largest<double>() : params;
    Rate rate{std::sqrt(squares / n), 1.0};
    if (rate.size < r.rms_floor) rate.size = r.rms_floor;
    if (r.direction == Direction::kSign) return rate;
    const double norm = std::sqrt(directions / n);
    rate.direction = 1.0 / (norm < 0x1p-126 ? 0x1p-126 : norm);
    return rate;
  }
};

enum class Verdict : int8_t { kUpdate, kSkip, kShrink };

TIGER_EXT_INLINE Verdict judge(const RuleParams& r, const Facts& facts) {
  if (facts.finite || !r.adds) return Verdict::kUpdate;
  return r.nonfinite == Nonfinite::kSkip     ? Verdict::kSkip
         : r.nonfinite == Nonfinite::kShrink ? Verdict::kShrink
                                             : Verdict::kUpdate;
}

}  // namespace tiger_ext
