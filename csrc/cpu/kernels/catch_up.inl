// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: rows that are brought up to date without a gradient.

// Brings rows of a table up to date: ids[begin, end), or without ids rows [begin, end).
template <typename T, typename Rule>
struct CatchUpOfRule {
  static int64_t run(const RowsItem& item, const int64_t* ids, int64_t begin, int64_t end) {
    return updates_rows_in_place<T, Rule>(item) ? rows<true>(item, ids, begin, end)
                                                : rows<false>(item, ids, begin, end);
  }

 private:
  // Of each block of rows first those are listed that are behind: few, where ids repeat, so that
  // they can be fetched well ahead.
  template <bool kInPlace>
  static int64_t rows(const RowsItem& item, const int64_t* ids, int64_t begin, int64_t end) {
    constexpr int64_t kAtOnce = 1024, kClocksAhead = 64, kRowsAhead = 24;
    const RowUpdate<T, Rule, kInPlace> update(item);
    const int32_t* const last_step = item.rule.last_step;
    const int32_t current = item.rule.params->current;
    int64_t behind[kAtOnce];
    int64_t written = 0;
    for (int64_t first = begin; first < end; first += kAtOnce) {
      const int64_t last = end - first < kAtOnce ? end : first + kAtOnce;
      int64_t count = 0;
      for (int64_t i = first; i < last; ++i) {
        if (ids)
          __builtin_prefetch(last_step + ids[i + kClocksAhead < end ? i + kClocksAhead : i], 0, 2);
        const int64_t row = ids ? ids[i] : i;
        behind[count] = row;  // kept if it is, without a branch
        count += current_up_to(__atomic_load_n(last_step + row, __ATOMIC_RELAXED)) < current;
      }
      for (int64_t k = 0; k < count && k < kRowsAhead; ++k) fetch(item, behind[k]);
      for (int64_t k = 0; k < count; ++k) {
        if (k + kRowsAhead < count) fetch(item, behind[k + kRowsAhead]);
        written += update.catch_up(behind[k]);
      }
    }
    return written;
  }

  static TIGER_EXT_INLINE void fetch(const RowsItem& item, int64_t row) {
    fetch(item.param, item.param_layout, item.dim, row);
    for (int k = 0; k < Rule::kStates; ++k)
      fetch(item.states[k], item.state_layouts[k], item.dim, row);
    if (item.scales && !item.block_scales) __builtin_prefetch(item.scales + row, 1, 2);
    if (item.row_moment) __builtin_prefetch(static_cast<const T*>(item.row_moment) + row, 1, 2);
  }
  static TIGER_EXT_INLINE void fetch(const Stream& s, const RowLayout& layout, int64_t dim,
                                     int64_t row) {
    if (layout.inner) return;
    const int64_t size = storage_size(s.storage), bytes = dim * size;
    prefetch_bytes(static_cast<const char*>(s.data) + layout.offset(row) * size,
                   bytes < 1024 ? bytes : 1024);
  }
};
