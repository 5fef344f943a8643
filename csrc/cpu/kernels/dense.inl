// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: every element of a tensor with a strided gradient.

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
    const Mixture mixture = item.grad.data ? mixture_of(item.grad.storage, item.param.storage,
                                                        item.states, Rule::kStates)
                                           : Mixture::kOther;
    if (mixture != Mixture::kOther) {
      const int64_t offsets[kMaxStates] = {begin, begin};
      const char* const grad = static_cast<const char*>(item.grad.data);
      return apply_mixture(mixture, rule, grad + begin * storage_size(item.grad.storage),
                           item.param, begin, item.states, offsets, end - begin);
    }
  }
  alignas(kCacheLine) T grad[kBlock];
  const int64_t* no_index[kMaxStates] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const int64_t offsets[kMaxStates] = {i, i};
    apply_converted(rule, view(item.grad, i, nullptr, n, grad), item.param, i, nullptr, item.states,
                    offsets, no_index, n);
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
        directions ? view(item.states[0], i, nullptr, n, exp_avg) : nullptr, n));
  }
  return facts;
}
