// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: updates of half precision tensors in one pass, without a block in the
// arithmetic type between.

// The rule over elements that are converted on the way, in registers.
template <typename Rule, typename G, typename P, typename... S>
TIGER_EXT_INLINE void apply_lanes(const Rule& given, const G* grad, P* param, int64_t n,
                                  S*... states) {
  const Rule rule = given;
  float g[kLanes], p[kLanes], s[sizeof...(S) + 1][kLanes];
  const auto update = [&]<size_t... k>(std::index_sequence<k...>) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      load_lanes(grad + i, g);
      load_lanes(param + i, p);
      (load_lanes(states + i, s[k]), ...);
      for (int l = 0; l < kLanes; ++l) rule(g[l], p[l], s[k][l]...);
      store_lanes(p, param + i);
      (store_lanes(s[k], states + i), ...);
    }
    if (i == n) return;
    load_some(grad + i, n - i, g);
    load_some(param + i, n - i, p);
    (load_some(states + i, n - i, s[k]), ...);
    for (int l = 0; l < kLanes; ++l) rule(g[l], p[l], s[k][l]...);
    store_some(p, n - i, param + i);
    (store_some(s[k], n - i, states + i), ...);
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
    const G* const g = static_cast<const G*>(grad);
    P* const p = static_cast<P*>(param.data) + param_offset;
    const auto state = [&]<typename Type>(int k) {
      return static_cast<Type*>(states[k].data) + state_offsets[k];
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
