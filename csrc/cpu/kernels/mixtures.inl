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

// The rule over elements that are converted on the way, in registers.
template <typename Rule, typename G, typename P, typename... S>
TIGER_EXT_INLINE void apply_lanes(const Rule& given, const G& grad, const P& param, int64_t n,
                                  const S&... states) {
  const Rule rule = given;
  float g[kLanes], p[kLanes], s[sizeof...(S) + 1][kLanes];
  const auto update = [&]<size_t... k>(std::index_sequence<k...>) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      grad.load(i, g);
      param.load(i, p);
      (states.load(i, s[k]), ...);
      for (int l = 0; l < kLanes; ++l) rule(g[l], p[l], s[k][l]...);
      param.store(i, p);
      (states.store(i, s[k]), ...);
    }
    if (i == n) return;
    grad.load(i, n - i, g);
    param.load(i, n - i, p);
    (states.load(i, n - i, s[k]), ...);
    for (int l = 0; l < kLanes; ++l) rule(g[l], p[l], s[k][l]...);
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

template <typename Rule>
__attribute__((noinline)) void apply_rounded_lanes(const Rule& rule, const float* grad,
                                                   const Stream& param, const Stream* states,
                                                   const BlockPlace& at, int64_t n, float scale,
                                                   const RandomUnit* for_param, int64_t first,
                                                   float* momentum) {
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
      if (states[0].storage == Storage::kInt8)
        with_momentum.template operator()<float>(QuantisedElements{
            static_cast<const int8_t*>(states[0].data) + at.states[0], scale, momentum});
      else if (states[0].storage == Storage::kFloat32)
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

// A block of what is rounded stochastically. A momentum in int8 is not stored: it waits for the
// scale of its unit, in momentum[n]. `for_param`: null where the parameter is rounded to nearest.
template <typename T, typename Rule>
void update_rounded_block(const Rule& rule, const T* grad, const Stream& param,
                          const Stream* states, const BlockPlace& at, int64_t n, float scale,
                          const RandomUnit* for_param, int64_t first, T* momentum) {
  if constexpr (kMixes<T, Rule>) {
    bool contiguous = !at.param_index;
    for (int k = 0; k < Rule::kStates; ++k) contiguous = contiguous && !at.state_indices[k];
    if (contiguous && rounds_in_lanes(param, states, Rule::kStates))
      return apply_rounded_lanes(rule, grad, param, states, at, n, scale, for_param, first,
                                 momentum);
  }
  Block<T, Rule::kStates> block(param, states, at, n);
  block.update(rule, grad, scale);
  if (moves_param(rule)) {
    if (for_param) block.store_param(*for_param, first);
    else block.store_param();
  }
  block.store_states();
  if (Rule::kStates > 0 && states[0].storage == Storage::kInt8)
    memcpy(momentum, block.momentum(), static_cast<size_t>(n) * sizeof(T));
}
