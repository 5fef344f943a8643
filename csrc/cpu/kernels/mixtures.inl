// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: updates of half precision tensors in one pass, without a block in the
// arithmetic type between.

// Contiguous elements as they are stored.
template <typename S>
struct Elements {
  S* data;

  TIGER_EXT_INLINE void load(int64_t i, float* out) const { load_lanes(data + i, out); }
  TIGER_EXT_INLINE void store(int64_t i, const float* in) const { store_lanes(in, data + i); }
  TIGER_EXT_INLINE void load(int64_t i, int64_t n, float* out) const {
    load_some(data + i, n, out);
  }
  TIGER_EXT_INLINE void store(int64_t i, int64_t n, const float* in) const {
    store_some(in, n, data + i);
  }

  TIGER_EXT_INLINE void load_pairs(int64_t i, FloatLanes& even, FloatLanes& odd) const
    requires std::is_same_v<std::remove_const_t<S>, BFloat16>
  {
    bfloat16_pairs(data + i, even, odd);
  }
  TIGER_EXT_INLINE void store_pairs(int64_t i, const FloatLanes& even, const FloatLanes& odd) const
    requires std::is_same_v<S, BFloat16>
  {
    BitLanes low, high;
    round_upper_half(even, low);
    round_upper_half(odd, high);
    store_upper_halves(low, high, data + i);
  }
};

// The same in half precision, rounded stochastically: elements `first`, first + 1, ... of a unit.
template <typename S>
struct RoundedElements : Elements<S> {
  RandomUnit random;
  int64_t first;

  TIGER_EXT_INLINE void store(int64_t i, const float* in) const {
    store_lanes_rounded(in, this->data + i, random, first + i);
  }
  TIGER_EXT_INLINE void store(int64_t i, int64_t n, const float* in) const {
    S all[kLanes];
    RoundedElements{{all}, random, first + i}.store(0, in);
    memcpy(this->data + i, all, static_cast<size_t>(n) * sizeof(S));
  }

  TIGER_EXT_INLINE void store_pairs(int64_t i, const FloatLanes& even, const FloatLanes& odd) const
    requires std::is_same_v<S, BFloat16>
  {
    BitLanes bits, low, high;
    random_pairs(random, (first + i) / 2, bits);
    round_upper_half(even, bits & 0xFFFFu, low);
    round_upper_half(odd, bits >> 16, high);
    store_upper_halves(low, high, this->data + i);
  }
};

// A momentum in int8: what becomes of it waits in float for its scale.
struct QuantisedElements {
  const int8_t* data;
  float scale;
  float* next;

  TIGER_EXT_INLINE void load(int64_t i, float* out) const {
    load_lanes(data + i, out);
    for (int l = 0; l < kLanes; ++l) out[l] *= scale;
  }
  TIGER_EXT_INLINE void store(int64_t i, const float* in) const { store_lanes(in, next + i); }
  TIGER_EXT_INLINE void load(int64_t i, int64_t n, float* out) const {
    load_some(data + i, n, out);
    for (int l = 0; l < kLanes; ++l) out[l] *= scale;
  }
  TIGER_EXT_INLINE void store(int64_t i, int64_t n, const float* in) const {
    store_some(in, n, next + i);
  }
};

// Elements that lie in pairs.
template <typename E>
constexpr bool kIsPaired = requires(E e, FloatLanes x) { e.load_pairs(0, x, x); };

// The rule over kLanes elements.
template <typename Rule, typename... S>
TIGER_EXT_INLINE void apply_to_lanes(const Rule& rule, const float* g, float* p, S*... s) {
  if constexpr (kTakesLanes<Rule>) {
    for (int l = 0; l < kLanes; l += kWidth) {
      FloatLanes grad, param, state;
      memcpy(&grad, g + l, sizeof grad);
      memcpy(&param, p + l, sizeof param);
      (memcpy(&state, s + l, sizeof state), ...);
      apply_to_lanes(rule, grad, param, state);
      memcpy(p + l, &param, sizeof param);
      (memcpy(s + l, &state, sizeof state), ...);
    }
  } else {
    for (int l = 0; l < kLanes; ++l) rule(g[l], p[l], s[l]...);
  }
}

// The rule over elements that are converted on the way, in registers.
template <typename Rule, typename G, typename P, typename... S>
TIGER_EXT_INLINE void apply_lanes(const Rule& given, const G grad, const P param, int64_t n,
                                  const S... states) {
  const Rule rule = given;  // which no store can change, nor the others
  int64_t i = 0;
  if constexpr (kTakesLanes<Rule> && kIsPaired<G> && kIsPaired<P> && (kIsPaired<S> && ...)) {
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      FloatLanes g[2], p[2], s[2];
      grad.load_pairs(i, g[0], g[1]);
      param.load_pairs(i, p[0], p[1]);
      (states.load_pairs(i, s[0], s[1]), ...);
      apply_to_lanes(rule, g[0], p[0], s[0]);
      apply_to_lanes(rule, g[1], p[1], s[1]);
      param.store_pairs(i, p[0], p[1]);
      (states.store_pairs(i, s[0], s[1]), ...);
    }
  }
  float g[kLanes], p[kLanes], s[sizeof...(S) + 1][kLanes];
  const auto update = [&]<size_t... k>(std::index_sequence<k...>) __attribute__((always_inline)) {
    for (; i + kLanes <= n; i += kLanes) {
      grad.load(i, g);
      param.load(i, p);
      (states.load(i, s[k]), ...);
      apply_to_lanes(rule, g, p, s[k]...);
      param.store(i, p);
      (states.store(i, s[k]), ...);
    }
    if (i == n) return;
    grad.load(i, n - i, g);
    param.load(i, n - i, p);
    (states.load(i, n - i, s[k]), ...);
    apply_to_lanes(rule, g, p, s[k]...);
    param.store(i, n - i, p);
    (states.store(i, n - i, s[k]), ...);
  };
  update(std::make_index_sequence<sizeof...(S)>());
}

// Which storage types of gradient, parameter and states have a loop of their own in `apply_lanes`:
// those of training in half precision, with a momentum in it, or in float beside it.
enum class Mixture : int8_t { kOther, kHalf, kFloatGrad, kFloatState, kHalfParam, kHalfState };

inline bool is_half(Storage s) { return s == Storage::kBFloat16 || s == Storage::kFloat16; }

inline Mixture mixture_of(Storage grad, Storage param, const Stream* states, int count) {
  const auto float32 = Storage::kFloat32;
  const Storage state = count ? states[0].storage : param;
  const Storage last = count ? states[count - 1].storage : param;
  if (param == float32)  // a second moment is no narrower than its parameter
    return grad == float32 && is_half(state) && (count == 1 || last == float32)
               ? Mixture::kHalfState
               : Mixture::kOther;
  if (!is_half(param) || last != state) return Mixture::kOther;
  if (grad == param)
    return state == param     ? Mixture::kHalf
           : state == float32 ? Mixture::kFloatState
                              : Mixture::kOther;
  if (grad != float32) return Mixture::kOther;
  return state == param     ? Mixture::kFloatGrad
         : state == float32 ? Mixture::kHalfParam
                            : Mixture::kOther;
}

// Of contiguous elements, from the given places on.
template <typename Rule>
__attribute__((noinline)) void apply_mixture(Mixture mixture, const Rule& rule, const void* grad,
                                             const Stream& param, int64_t param_offset,
                                             const Stream* states, const int64_t* state_offsets,
                                             int64_t n) {
  const auto run = [&]<typename G, typename P, typename S, typename Last>() {
    const Elements<const G> g{static_cast<const G*>(grad)};
    const Elements<P> p{static_cast<P*>(param.data) + param_offset};
    const auto state = [&]<typename Type>(int k) {
      return Elements<Type>{static_cast<Type*>(states[k].data) + state_offsets[k]};
    };
    if constexpr (Rule::kStates == 0) apply_lanes(rule, g, p, n);
    else if constexpr (Rule::kStates == 1)
      apply_lanes(rule, g, p, n, state.template operator()<S>(0));
    else
      apply_lanes(rule, g, p, n, state.template operator()<S>(0),
                  state.template operator()<Last>(1));
  };
  const auto run_in = [&]<typename Half>() {
    switch (mixture) {
      case Mixture::kHalf:
        return run.template operator()<Half, Half, Half, Half>();
      case Mixture::kFloatGrad:
        return run.template operator()<float, Half, Half, Half>();
      case Mixture::kFloatState:
        return run.template operator()<Half, Half, float, float>();
      case Mixture::kHalfParam:
        return run.template operator()<float, Half, float, float>();
      case Mixture::kHalfState:
        return run.template operator()<float, float, Half, float>();
      case Mixture::kOther:
        return;
    }
  };
  const Storage half = mixture == Mixture::kHalfState ? states[0].storage : param.storage;
  if (half == Storage::kBFloat16) run_in.template operator()<BFloat16>();
  else run_in.template operator()<Float16>();
}

// Whether a rule has these loops: the common ones do, where the processor converts.
#if defined(TIGER_EXT_AVX2) || defined(TIGER_EXT_AVX512)
template <typename T, typename Rule>
constexpr bool kMixes = sizeof(T) == 4 && kIsOfGroups<Rule> && !Rule::kDirected;
#else
template <typename T, typename Rule>
constexpr bool kMixes = false;
#endif

// ------------------------------------------------------------------------- stochastic rounding

// The unit that a block of a momentum in int8 belongs to.
struct QuantisedUnit {
  float scale;        // of what is stored
  float* next_scale;  // of what becomes of it; null: it stays
  bool known;         // whether that is there: else the block is all of the unit
  RandomUnit random;
};

// `momentum`: the new one of elements `first`, first + 1, ... of the unit.
template <typename T>
TIGER_EXT_INLINE void quantise_block(const Stream* states, const BlockPlace& at, int64_t n,
                                     const T* momentum, int64_t first, const QuantisedUnit& unit) {
  if (!unit.next_scale) return;
  if (!unit.known) *unit.next_scale = quantisation_scale(largest_bits(momentum, n));
  quantise(states[0], at.states[0], at.state_indices[0], n, momentum, *unit.next_scale, unit.random,
           first);
}

template <typename Rule>
__attribute__((noinline)) void apply_rounded_lanes(const Rule& rule, const float* grad,
                                                   const Stream& param, const Stream* states,
                                                   const BlockPlace& at, int64_t n,
                                                   const RandomUnit* for_param, int64_t first,
                                                   const QuantisedUnit& unit) {
  const Elements<const float> g{grad};
  const auto elements = [&]<typename S>(int k) {
    return Elements<S>{static_cast<S*>(states[k].data) + at.states[k]};
  };
  // A second moment is as wide as float beside a momentum in int8, else of the same type.
  const auto with_param = [&]<typename Half>(const auto& p) {
    if constexpr (Rule::kStates == 0) {
      apply_lanes(rule, g, p, n);
    } else {
      const auto with_momentum = [&]<typename Last>(const auto& m) {
        if constexpr (Rule::kStates == 1) apply_lanes(rule, g, p, n, m);
        else apply_lanes(rule, g, p, n, m, elements.template operator()<Last>(1));
      };
      if (states[0].storage == Storage::kInt8) {
        alignas(kCacheLine) float momentum[kBlock];
        with_momentum.template operator()<float>(QuantisedElements{
            static_cast<const int8_t*>(states[0].data) + at.states[0], unit.scale, momentum});
        quantise_block(states, at, n, momentum, first, unit);
      } else if (states[0].storage == Storage::kFloat32)
        with_momentum.template operator()<float>(elements.template operator()<float>(0));
      else if constexpr (!std::is_same_v<Half, float>)
        with_momentum.template operator()<Half>(elements.template operator()<Half>(0));
    }
  };
  const auto with_type = [&]<typename P>() {
    const Elements<P> p{static_cast<P*>(param.data) + at.param};
    if constexpr (!std::is_same_v<P, float>)
      if (for_param)
        return with_param.template operator()<P>(RoundedElements<P>{p, *for_param, first});
    with_param.template operator()<P>(p);
  };
  if (param.storage == Storage::kFloat32) with_type.template operator()<float>();
  else if (param.storage == Storage::kBFloat16) with_type.template operator()<BFloat16>();
  else with_type.template operator()<Float16>();
}

// Whether `apply_rounded_lanes` has a loop for these types.
inline bool rounds_in_lanes(const Stream& param, const Stream* states, int count) {
  if (param.storage != Storage::kFloat32 && !is_half(param.storage)) return false;
  if (count == 0) return true;
  const Storage momentum = states[0].storage, last = states[count - 1].storage;
  if (momentum != Storage::kInt8)
    return last == momentum && (momentum == Storage::kFloat32 || momentum == param.storage);
  return count == 1 || last == Storage::kFloat32;
}

// A block of what is rounded stochastically: elements `first`, first + 1, ... of its unit.
// `for_param`: null where the parameter is rounded to nearest.
template <typename T, typename Rule>
void update_rounded_block(const Rule& rule, const T* grad, const Stream& param,
                          const Stream* states, const BlockPlace& at, int64_t n,
                          const RandomUnit* for_param, int64_t first, const QuantisedUnit& unit) {
  if constexpr (kMixes<T, Rule>) {
    bool contiguous = !at.param_index;
    for (int k = 0; k < Rule::kStates; ++k) contiguous = contiguous && !at.state_indices[k];
    if (contiguous && rounds_in_lanes(param, states, Rule::kStates))
      return apply_rounded_lanes(rule, grad, param, states, at, n, for_param, first, unit);
  }
  Block<T, Rule::kStates> block(param, states, at, n);
  block.update(rule, grad, unit.scale);
  if (moves_param(rule)) {
    if (for_param) block.store_param(*for_param, first);
    else block.store_param();
  }
  block.store_states();
  if constexpr (Rule::kStates > 0) quantise_block(states, at, n, block.momentum(), first, unit);
}
