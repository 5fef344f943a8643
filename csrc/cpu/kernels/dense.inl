// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: every element of a tensor with a strided gradient.

// One of a dense item's blocks that are rounded stochastically.
template <typename T, typename Rule>
void update_block(const DenseItem& item, const Rule& rule, const T* grad, const BlockPlace& at,
                  int64_t unit, int64_t n) {
  const Rounding& rounding = item.rule.rounding;
  float* const scale = item.scales ? item.scales + unit : nullptr;
  const bool quantises = Rule::kStates > 0 && item.rule.params->adds;
  const RandomUnit for_param(rounding.param_key, unit);
  update_rounded_block(rule, grad, item.param, item.states, at, n,
                       rounding.param ? &for_param : nullptr, 0,
                       {scale ? *scale : 0.0f, quantises ? scale : nullptr, false,
                        RandomUnit(rounding.momentum_key, unit)});
}

// Fetches a block ahead: half of the work on one is done when all of it has been read.
template <int kStates>
TIGER_EXT_INLINE void fetch_block(const DenseItem& item, int64_t begin, int64_t end) {
  const int64_t n = end - begin < kBlock ? end - begin : kBlock;
  if (n <= 0) return;
  const auto fetch = [&](const Stream& s) {
    const int64_t size = storage_size(s.storage);
    prefetch_bytes(static_cast<const char*>(s.data) + begin * size, n * size);
  };
  if (item.grad.data) fetch(item.grad);
  fetch(item.param);
  for (int k = 0; k < kStates; ++k) fetch(item.states[k]);
}

template <typename T, typename Rule>
void dense_span(const DenseItem& item, int64_t begin, int64_t end) {
  const Rule rule(*item.rule.params);
  if (updates_in_place<T>(item, Rule::kStates) && item.grad.data && is_native<T>(item.grad)) {
    T* states[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k)
      states[k] = static_cast<T*>(item.states[k].data) + begin;
    apply(rule, static_cast<const T*>(item.grad.data) + begin,
          static_cast<T*>(item.param.data) + begin, states, end - begin);
    return;
  }
  if constexpr (kMixes<T, Rule>) {
    const Mixture mixture =
        item.grad.data && !item.has_blocks()
            ? mixture_of(item.grad.storage, item.param.storage, item.states, Rule::kStates)
            : Mixture::kOther;
    if (mixture != Mixture::kOther) {
      const int64_t offsets[kMaxStates] = {begin, begin};
      const char* const grad = static_cast<const char*>(item.grad.data);
      return apply_mixture(mixture, rule, grad + begin * storage_size(item.grad.storage),
                           item.param, begin, item.states, offsets, end - begin);
    }
  }
  alignas(kCacheLine) T grad[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const T* const g = view(item.grad, i, nullptr, n, grad);
    const BlockPlace at{i, nullptr, {i, i}, {}};
    if (item.has_blocks()) {
      fetch_block<Rule::kStates>(item, i + 2 * kBlock, end);
      update_block<T>(item, rule, g, at, i / kBlock, n);
    } else apply_converted(rule, g, item.param, item.states, at, n);
  }
}

template <typename T>
Facts look_at_span(const DenseItem& item, int64_t begin, int64_t end) {
  const RuleParams& r = *item.rule.params;
  const Momentum<T> rule(r);
  Facts facts;
  alignas(kCacheLine) T grad[kBlock], param[kBlock], exp_avg[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const bool directions = wants_directions(r);
    facts.add(look_at(
        r, rule, directions || wants_finite(r) ? view(item.grad, i, nullptr, n, grad) : nullptr,
        r.scale != Scale::kNone ? view(item.param, i, nullptr, n, param) : nullptr,
        directions ? momentum_view(item, item.states[0], i, nullptr, i / kBlock, n, exp_avg)
                   : nullptr,
        n));
  }
  return facts;
}
