// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: the sum of a run, the entries of one row in the sorted list, and the
// fetching of rows ahead of it.

// The gradient of a row: block(column, n) in the arithmetic type, and stored(column, n) as it is
// stored, null where that is not the row's gradient or is in the arithmetic type.
template <typename Block, typename Stored>
struct RowGrad {
  Block block;
  Stored stored;

  TIGER_EXT_INLINE auto operator()(int64_t c, int64_t n) const { return block(c, n); }
};

// Into the second-level cache: random rows are limited by how many cache misses are in flight, and
// the first level allows far fewer of them (measured: 1.5 to 2 times the time).
TIGER_EXT_INLINE void prefetch_bytes(const void* start, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(start);
  const uintptr_t mask = ~static_cast<uintptr_t>(kCacheLine - 1);
  for (uintptr_t line = begin & mask; line < begin + static_cast<uintptr_t>(bytes);
       line += kCacheLine)
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
}

// out[w] = the sum over entries [begin, end) of column w, for a fixed number of columns, which the
// compiler keeps in registers.
template <typename T, int kWidth>
TIGER_EXT_INLINE void sum_columns(const T* values, int64_t stride, const SortedEntries& sorted,
                                  int64_t first_entry, int64_t begin, int64_t end, int64_t ahead,
                                  T* __restrict out) {
  T sum[kWidth];
  const T* row = values + (sorted.position(begin) - first_entry) * stride;
  for (int w = 0; w < kWidth; ++w) sum[w] = row[w];
  for (int64_t i = begin + 1; i < end; ++i) {
    row = values + (sorted.position(i) - first_entry) * stride;
    if (i + ahead < end)
      prefetch_bytes(values + (sorted.position(i + ahead) - first_entry) * stride, sizeof sum);
    for (int w = 0; w < kWidth; ++w) sum[w] += row[w];
  }
  for (int w = 0; w < kWidth; ++w) out[w] = sum[w];
}

// The sum of entries [begin, end), at most kPiece of them, columns [column, column + n), n <=
// kBlock.
template <typename T>
void sum_entries(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end,
                 int64_t column, int64_t n, T* out) {
  if (is_native<T>(item.values)) {
    constexpr int64_t kAhead = 32;
    const T* values = static_cast<const T*>(item.values.data) + column;
    const int64_t stride = item.value_stride, first = item.first_entry;
    constexpr int kWide = 256 / sizeof(T), kNarrow = 64 / sizeof(T);
    int64_t c = 0;
    for (; c + kWide <= n; c += kWide)
      sum_columns<T, kWide>(values + c, stride, sorted, first, begin, end, kAhead, out + c);
    for (; c + kNarrow <= n; c += kNarrow)
      sum_columns<T, kNarrow>(values + c, stride, sorted, first, begin, end, kAhead, out + c);
    for (; c < n; ++c)
      sum_columns<T, 1>(values + c, stride, sorted, first, begin, end, kAhead, out + c);
    return;
  }
  alignas(kCacheLine) T row[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t offset = (sorted.position(i) - item.first_entry) * item.value_stride + column;
    load(item.values, offset, nullptr, n, i == begin ? out : row);
    if (i > begin)
      for (int64_t w = 0; w < n; ++w) out[w] += row[w];
  }
}

// The sum of a whole run, in pieces.
template <typename T>
void sum_run(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end,
             int64_t column, int64_t n, T* out) {
  sum_entries(item, sorted, begin, end - begin < kPiece ? end : begin + kPiece, column, n, out);
  alignas(kCacheLine) T piece[kBlock];
  for (int64_t i = begin + kPiece; i < end; i += kPiece) {
    sum_entries(item, sorted, i, end - i < kPiece ? end : i + kPiece, column, n, piece);
    for (int64_t w = 0; w < n; ++w) out[w] += piece[w];
  }
}

inline int64_t run_end(const SortedEntries& sorted, int64_t i, int64_t limit) {
  const uint64_t row = sorted.row(i);
  int64_t end = i + 1;
  while (end < limit && sorted.row(end) == row) {
    ++end;
    if (end - i == 64) {  // long: the end by bisection
      int64_t high = limit;
      while (end < high) {
        const int64_t middle = end + (high - end) / 2;
        if (sorted.row(middle) == row) end = middle + 1;
        else high = middle;
      }
      return end;
    }
  }
  return end;
}

template <typename T>
const T* find_long_run(const LongRuns& runs, int64_t begin) {
  int64_t low = 0, high = runs.size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (runs.data[middle].begin < begin) low = middle + 1;
    else high = middle;
  }
  if (low < runs.size && runs.data[low].begin == begin)
    return static_cast<const T*>(runs.data[low].sum);
  return nullptr;
}

// Fetches the rows of entries some way ahead of the one being computed.
template <typename T, int kStates>
class Prefetcher {
 public:
  Prefetcher(const RowsItem& item, const SortedEntries& sorted, int64_t begin)
      : item_(item), sorted_(sorted), next_(begin) {
    value_size_ = storage_size(item.values.storage);
    add(item.param, item.param_layout);
    for (int k = 0; k < kStates; ++k) add(item.states[k], item.state_layouts[k]);
    const int64_t row_bytes = item.dim * static_cast<int64_t>(sizeof(T));
    ahead_ = row_bytes * kMaxAhead <= kBytesAhead ? kMaxAhead
                                                  : (kBytesAhead + row_bytes - 1) / row_bytes;
  }

  // Block [column, column + n) of the row that comes after the run [begin, end) is computed. Rows
  // of one block are fetched for all entries in reach; of longer rows the same block of one entry
  // ahead, which spreads the fetches evenly over the computation.
  TIGER_EXT_INLINE void operator()(int64_t begin, int64_t end, int64_t column, int64_t n) {
    const int64_t limit = item_.first_entry + item_.entries;
    if (item_.dim <= kBlock) {
      // Within a long run the summation fetches for itself.
      if (next_ < end && end - begin > ahead_) next_ = end;
      for (const int64_t until = end + ahead_ < limit ? end + ahead_ : limit; next_ < until;
           ++next_)
        fetch(next_, 0, item_.dim);
    } else if (end - 1 + ahead_ < limit) {
      fetch(end - 1 + ahead_, column, n);
      row_ = ~uint64_t{0};
    }
  }

  // The parameter's row of a later entry, into the first level: it is looked at as a whole before
  // anything else of the row is needed.
  TIGER_EXT_INLINE void near(int64_t entry) const {
    if (count_ == 0 || item_.dim > 4 * kBlock) return;
    const int64_t r = static_cast<int64_t>(sorted_.row(entry)) - item_.first_row;
    const uintptr_t begin =
        reinterpret_cast<uintptr_t>(streams_[0].data + r * streams_[0].row_bytes);
    for (int64_t b = 0; b < item_.dim * streams_[0].size; b += kCacheLine)
      __builtin_prefetch(reinterpret_cast<const void*>(begin + static_cast<uintptr_t>(b)), 0, 3);
  }

 private:
  static constexpr int64_t kBytesAhead = 16384;  // of each tensor
  static constexpr int64_t kMaxAhead = 64;

  void add(const Stream& s, const RowLayout& layout) {
    if (layout.dims != 0 || layout.inner) return;
    const int64_t size = storage_size(s.storage);
    streams_[count_++] = {static_cast<const char*>(s.data), layout.row_stride * size, size};
  }

  TIGER_EXT_INLINE void fetch(int64_t entry, int64_t column, int64_t n) {
    const int64_t offset =
        (sorted_.position(entry) - item_.first_entry) * item_.value_stride + column;
    if (item_.values.data)
      prefetch_bytes(static_cast<const char*>(item_.values.data) + offset * value_size_,
                     n * value_size_);
    const uint64_t row = sorted_.row(entry);
    if (row == row_) return;
    row_ = row;
    const int64_t r = static_cast<int64_t>(row) - item_.first_row;
    if (item_.rule.last_step) __builtin_prefetch(item_.rule.last_step + r, 1, 2);
    if (item_.scales) __builtin_prefetch(item_.scales + r, 1, 2);
    if (item_.row_moment) __builtin_prefetch(static_cast<const T*>(item_.row_moment) + r, 1, 2);
    for (int k = 0; k < count_; ++k)
      prefetch_bytes(streams_[k].data + r * streams_[k].row_bytes + column * streams_[k].size,
                     n * streams_[k].size);
  }

  struct ByteStream {
    const char* data;
    int64_t row_bytes, size;
  };

  const RowsItem& item_;
  const SortedEntries& sorted_;
  ByteStream streams_[1 + kStates] = {};
  int count_ = 0;
  int64_t value_size_, ahead_, next_;
  uint64_t row_ = ~uint64_t{0};  // the last one fetched
};

template <typename T>
void combine_pieces_as(const RowsItem& item, void* pieces, int64_t count) {
  T* __restrict total = static_cast<T*>(pieces);
  for (int64_t k = 1; k < count; ++k) {
    const T* __restrict piece = total + k * item.dim;
    for (int64_t w = 0; w < item.dim; ++w) total[w] += piece[w];
  }
}
