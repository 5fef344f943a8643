// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: the rows that a gradient touches, from sorted entries or a strided gradient.

struct NoPrefetch {
  TIGER_EXT_INLINE void near(int64_t) const {}
  NoPrefetch(const RowsItem&, const SortedEntries&, int64_t) {}
  TIGER_EXT_INLINE void operator()(int64_t, int64_t, int64_t, int64_t) {}
};

// f(row, grad_of) for every run that starts in [begin, end) of the sorted entries, where
// grad_of is its RowGrad. Stops when f returns false.
template <typename T, typename Prefetch, typename F>
TIGER_EXT_INLINE void for_each_run(const RowsItem& item, const SortedEntries& sorted,
                                   const LongRuns& long_runs, int64_t begin, int64_t end,
                                   const F& f) {
  const int64_t limit = item.first_entry + item.entries;
  const bool native_values = is_native<T>(item.values);
  const bool looks = item.rule.params && item.rule.params->looks();
  alignas(kCacheLine) T sum[kBlock];

  int64_t i = begin;
  if (i > item.first_entry)  // a run that started before `begin` is not ours
    while (i < end && sorted.row(i) == sorted.row(i - 1)) i = run_end(sorted, i, limit);
  Prefetch prefetch(item, sorted, i);

  for (int64_t next; i < end; i = next) {
    next = run_end(sorted, i, limit);
    if (looks && next + 1 < end) prefetch.near(next + 1);
    const T* grad = nullptr;  // the summed row, if it lies somewhere already
    if (next - i == 1 && native_values)
      grad = static_cast<const T*>(item.values.data) +
             (sorted.position(i) - item.first_entry) * item.value_stride;
    else if (next - i > kPiece) grad = find_long_run<T>(long_runs, i);
    int64_t summed = -1;  // the block that `sum` holds

    const auto block = [&](int64_t c, int64_t n) __attribute__((always_inline)) -> const T* {
      prefetch(i, next, c, n);
      if (!item.values.data) return zeros<T>();
      if (grad) return grad + c;
      if (c != summed) sum_run(item, sorted, i, next, c, n, sum);
      summed = c;
      return sum;
    };
    const auto stored = [&](int64_t c, int64_t n) __attribute__((always_inline)) -> const void* {
      if (next - i > 1 || native_values || !item.values.data) return nullptr;
      prefetch(i, next, c, n);
      const int64_t at = (sorted.position(i) - item.first_entry) * item.value_stride + c;
      return static_cast<const char*>(item.values.data) + at * storage_size(item.values.storage);
    };
    const RowGrad grad_of{block, stored};
    if (!f(static_cast<int64_t>(sorted.row(i)) - item.first_row, grad_of)) return;
  }
}

// Whether any of n elements is not zero: on bits, so that no mode of the processor that takes
// subnormals for zero matters.
template <typename Bits>
bool any_bits(const void* data, int64_t n) {
  const Bits* __restrict x = static_cast<const Bits*>(data);
  constexpr int64_t kAtOnce = 64;
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
    Bits any = 0;
    for (int64_t k = 0; k < kAtOnce; ++k) any |= x[i + k];
    if (static_cast<Bits>(any << 1)) return true;  // without the sign: -0 is zero
  }
  Bits any = 0;
  for (; i < n; ++i) any |= x[i];
  return static_cast<Bits>(any << 1) != 0;
}

inline bool any_nonzero(const Stream& s, int64_t offset, int64_t n) {
  const int64_t size = storage_size(s.storage);
  const char* const data = static_cast<const char*>(s.data) + offset * size;
  return size == 4   ? any_bits<uint32_t>(data, n)
         : size == 2 ? any_bits<uint16_t>(data, n)
                     : any_bits<uint64_t>(data, n);
}

// f(row, grad_of) for every touched row among [begin, end) of a direct item.
template <typename T, typename F>
TIGER_EXT_INLINE void for_each_touched_row(const RowsItem& item, int64_t begin, int64_t end,
                                           const F& f) {
  const RuleParams& r = *item.rule.params;
  alignas(kCacheLine) T buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    if (item.values.data) {
      if (r.touched == Touched::kMasked && !item.mask[row]) continue;
      if (r.touched == Touched::kNonzero &&
          !any_nonzero(item.values, row * item.value_stride, item.dim))
        continue;
    }
    const auto block = [&](int64_t c, int64_t n) -> const T* {
      return view(item.values, row * item.value_stride + c, nullptr, n, buffer);
    };
    const auto stored = [&](int64_t c, int64_t) -> const void* {
      if (is_native<T>(item.values) || !item.values.data) return nullptr;
      const int64_t at = row * item.value_stride + c;
      return static_cast<const char*>(item.values.data) + at * storage_size(item.values.storage);
    };
    const RowGrad grad_of{block, stored};
    if (!f(row, grad_of)) return;
  }
}

template <typename T, typename Rule>
bool updates_rows_in_place(const RowsItem& item) {
  bool in_place = updates_in_place<T>(item, Rule::kStates) && item.param_layout.dims == 0 &&
                  !item.param_layout.inner;
  for (int k = 0; k < Rule::kStates; ++k)
    in_place = in_place && item.state_layouts[k].dims == 0 && !item.state_layouts[k].inner;
  return in_place;
}

template <typename T, typename Rule>
struct RowsOfRule {
  static void sorted(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
                     int64_t begin, int64_t end) {
    if (updates_rows_in_place<T, Rule>(item)) run<true>(item, sorted, long_runs, begin, end);
    else run<false>(item, sorted, long_runs, begin, end);
  }
  static void direct(const RowsItem& item, int64_t begin, int64_t end) {
    if (updates_rows_in_place<T, Rule>(item)) look<true>(item, begin, end);
    else look<false>(item, begin, end);
  }

 private:
  template <bool kInPlace>
  static void run(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
                  int64_t begin, int64_t end) {
    const RowUpdate<T, Rule, kInPlace> update(item);
    for_each_run<T, Prefetcher<T, Rule::kStates>>(item, sorted, long_runs, begin, end,
                                                  [&](int64_t row, const auto& grad_of) {
                                                    update(row, grad_of);
                                                    return true;
                                                  });
  }
  template <bool kInPlace>
  static void look(const RowsItem& item, int64_t begin, int64_t end) {
    const RowUpdate<T, Rule, kInPlace> update(item);
    for_each_touched_row<T>(item, begin, end, [&](int64_t row, const auto& grad_of) {
      update(row, grad_of);
      return true;
    });
  }
};
