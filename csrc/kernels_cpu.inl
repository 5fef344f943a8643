// SPDX-License-Identifier: Apache-2.0
//
// The leaf kernels, compiled once per instruction set: each kernels_<isa>.cpp opens a target region
// and includes this file in a namespace of its own. Loops are plain; the compiler vectorises them.
//
// Tensors whose storage is the arithmetic type are updated in place ("native"); all others go
// through blocks of kBlock elements in the L1 cache, so that any mixture of storage types costs one
// conversion loop per type instead of one kernel per combination.

namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kCacheLine = 64;

template <typename T>
constexpr Storage native_storage() {
  return sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32;
}

// ---------------------------------------------------------------------------- load and store

template <typename T, typename S>
void load_as(const void* data, int64_t offset, const int64_t* index, int64_t n, T* __restrict out) {
  const S* __restrict source = static_cast<const S*>(data) + offset;
  if (index) {
    for (int64_t i = 0; i < n; ++i) out[i] = load_element<T>(source[index[i]]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = load_element<T>(source[i]);
  }
}

template <typename T, typename S>
void store_as(void* data, int64_t offset, const int64_t* index, int64_t n, const T* __restrict in) {
  S* __restrict target = static_cast<S*>(data) + offset;
  if (index) {
    for (int64_t i = 0; i < n; ++i) store_element<T>(target + index[i], in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store_element<T>(target + i, in[i]);
  }
}

// n elements from `offset` (then through `index`, if given) as T, into out.
template <typename T>
void load(const Stream& s, int64_t offset, const int64_t* index, int64_t n, T* out) {
  switch (s.storage) {
    case Storage::kFloat32:
      return load_as<T, float>(s.data, offset, index, n, out);
    case Storage::kFloat64:
      return load_as<T, double>(s.data, offset, index, n, out);
    case Storage::kBFloat16:
      return load_as<T, BFloat16>(s.data, offset, index, n, out);
    case Storage::kFloat16:
      return load_as<T, Float16>(s.data, offset, index, n, out);
  }
}

template <typename T>
void store(const Stream& s, int64_t offset, const int64_t* index, int64_t n, const T* in) {
  switch (s.storage) {
    case Storage::kFloat32:
      return store_as<T, float>(s.data, offset, index, n, in);
    case Storage::kFloat64:
      return store_as<T, double>(s.data, offset, index, n, in);
    case Storage::kBFloat16:
      return store_as<T, BFloat16>(s.data, offset, index, n, in);
    case Storage::kFloat16:
      return store_as<T, Float16>(s.data, offset, index, n, in);
  }
}

// -------------------------------------------------------------------------------- one block

template <typename T, typename Rule>
TIGER_EXT_INLINE void apply(const Rule& rule, const T* __restrict grad, T* __restrict param,
                            T* const* states, int64_t n) {
  T* __restrict s0 = states[0];
  if constexpr (Rule::kStates == 1) {
    for (int64_t i = 0; i < n; ++i) rule(grad[i], param[i], s0[i]);
  } else {
    T* __restrict s1 = states[1];
    for (int64_t i = 0; i < n; ++i) rule(grad[i], param[i], s0[i], s1[i]);
  }
}

template <typename T>
bool is_native(const Stream& s) {
  return s.storage == native_storage<T>();
}

template <typename T, typename Item>
bool updates_in_place(const Item& item, int states) {
  bool native = is_native<T>(item.param);
  for (int k = 0; k < states; ++k) native = native && is_native<T>(item.states[k]);
  return native;
}

// One block of at most kBlock elements through the L1 cache; offsets and indices per stream.
template <typename T, typename Rule>
void apply_converted(const Rule& rule, const T* grad, const Stream& param, int64_t param_offset,
                     const int64_t* param_index, const Stream* states, const int64_t* state_offsets,
                     const int64_t* const* state_indices, int64_t n) {
  alignas(kCacheLine) T p[kBlock];
  alignas(kCacheLine) T s[kMaxStates][kBlock];
  T* pointers[kMaxStates] = {s[0], s[1]};
  load(param, param_offset, param_index, n, p);
  for (int k = 0; k < Rule::kStates; ++k)
    load(states[k], state_offsets[k], state_indices[k], n, s[k]);
  apply(rule, grad, p, pointers, n);
  store(param, param_offset, param_index, n, p);
  for (int k = 0; k < Rule::kStates; ++k)
    store(states[k], state_offsets[k], state_indices[k], n, s[k]);
}

// -------------------------------------------------------------------------------- dense road

template <typename T, typename Rule>
void dense_span(const DenseItem& item, int64_t begin, int64_t end) {
  const Rule rule(*item.rule.params);
  if (updates_in_place<T>(item, Rule::kStates) && is_native<T>(item.grad)) {
    T* states[kMaxStates];
    for (int k = 0; k < Rule::kStates; ++k)
      states[k] = static_cast<T*>(item.states[k].data) + begin;
    apply(rule, static_cast<const T*>(item.grad.data) + begin,
          static_cast<T*>(item.param.data) + begin, states, end - begin);
    return;
  }
  alignas(kCacheLine) T grad[kBlock];
  const int64_t* no_index[kMaxStates] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const int64_t offsets[kMaxStates] = {i, i};
    load(item.grad, i, nullptr, n, grad);
    apply_converted(rule, grad, item.param, i, nullptr, item.states, offsets, no_index, n);
  }
}

// --------------------------------------------------------------------------------- rows road

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
    prefetch_bytes(static_cast<const char*>(item_.values.data) + offset * value_size_,
                   n * value_size_);
    const uint64_t row = sorted_.row(entry);
    if (row == row_) return;
    row_ = row;
    const int64_t r = static_cast<int64_t>(row) - item_.first_row;
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

template <typename T, typename Rule, bool kInPlace>
void rows_span(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
               int64_t begin, int64_t end) {
  const Rule rule(*item.rule.params);
  const int64_t limit = item.first_entry + item.entries;
  const bool native_values = is_native<T>(item.values);
  alignas(kCacheLine) T sum[kBlock];

  int64_t i = begin;
  if (i > item.first_entry)  // a run that started before `begin` is not ours
    while (i < end && sorted.row(i) == sorted.row(i - 1)) i = run_end(sorted, i, limit);
  Prefetcher<T, Rule::kStates> prefetch(item, sorted, i);

  for (int64_t next; i < end; i = next) {
    next = run_end(sorted, i, limit);
    const int64_t row = static_cast<int64_t>(sorted.row(i)) - item.first_row;
    const T* grad = nullptr;  // the summed row, if it lies somewhere already
    if (next - i == 1 && native_values)
      grad = static_cast<const T*>(item.values.data) +
             (sorted.position(i) - item.first_entry) * item.value_stride;
    else if (next - i > kPiece) grad = find_long_run<T>(long_runs, i);

    const int64_t param_row = item.param_layout.offset(row);
    int64_t state_rows[kMaxStates];
    for (int k = 0; k < Rule::kStates; ++k) state_rows[k] = item.state_layouts[k].offset(row);

    for (int64_t c = 0; c < item.dim; c += kBlock) {
      const int64_t n = item.dim - c < kBlock ? item.dim - c : kBlock;
      prefetch(i, next, c, n);
      if (!grad) sum_run(item, sorted, i, next, c, n, sum);
      const T* const block_grad = grad ? grad + c : sum;
      if constexpr (kInPlace) {
        T* states[kMaxStates];
        for (int k = 0; k < Rule::kStates; ++k)
          states[k] = static_cast<T*>(item.states[k].data) + state_rows[k] + c;
        apply(rule, block_grad, static_cast<T*>(item.param.data) + param_row + c, states, n);
      } else {
        // Through an index, offsets count from the start of the row's vector.
        const int64_t* const param_inner = item.param_layout.inner;
        int64_t state_offsets[kMaxStates];
        const int64_t* state_indices[kMaxStates];
        for (int k = 0; k < Rule::kStates; ++k) {
          const int64_t* const inner = item.state_layouts[k].inner;
          state_offsets[k] = inner ? state_rows[k] : state_rows[k] + c;
          state_indices[k] = inner ? inner + c : nullptr;
        }
        apply_converted(rule, block_grad, item.param, param_inner ? param_row : param_row + c,
                        param_inner ? param_inner + c : nullptr, item.states, state_offsets,
                        state_indices, n);
      }
    }
  }
}

template <typename T, typename Rule>
void rows_of_rule(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
                  int64_t begin, int64_t end) {
  bool in_place = updates_in_place<T>(item, Rule::kStates) && item.param_layout.dims == 0 &&
                  !item.param_layout.inner;
  for (int k = 0; k < Rule::kStates; ++k)
    in_place = in_place && item.state_layouts[k].dims == 0 && !item.state_layouts[k].inner;
  if (in_place) rows_span<T, Rule, true>(item, sorted, long_runs, begin, end);
  else rows_span<T, Rule, false>(item, sorted, long_runs, begin, end);
}

template <typename T>
void combine_pieces_as(const RowsItem& item, void* pieces, int64_t count) {
  T* __restrict total = static_cast<T*>(pieces);
  for (int64_t k = 1; k < count; ++k) {
    const T* __restrict piece = total + k * item.dim;
    for (int64_t w = 0; w < item.dim; ++w) total[w] += piece[w];
  }
}

// ------------------------------------------------------------------- arithmetic type and rule

inline bool is_double(const Stream& param) { return param.storage == Storage::kFloat64; }

template <typename T>
void dense_of_type(const DenseItem& item, int64_t begin, int64_t end) {
  switch (item.rule.params->kind) {
    case RuleKind::kSignMomentum:
      return dense_span<T, SignMomentum<T>>(item, begin, end);
    case RuleKind::kAdamW:
      return dense_span<T, AdamW<T>>(item, begin, end);
    case RuleKind::kAdamWWithoutMoment1:
      return dense_span<T, AdamWWithoutMoment1<T>>(item, begin, end);
  }
}

template <typename T>
void rows_of_type(const RowsItem& item, const SortedEntries& s, const LongRuns& l, int64_t b,
                  int64_t e) {
  switch (item.rule.params->kind) {
    case RuleKind::kSignMomentum:
      return rows_of_rule<T, SignMomentum<T>>(item, s, l, b, e);
    case RuleKind::kAdamW:
      return rows_of_rule<T, AdamW<T>>(item, s, l, b, e);
    case RuleKind::kAdamWWithoutMoment1:
      return rows_of_rule<T, AdamWWithoutMoment1<T>>(item, s, l, b, e);
  }
}

template <typename T>
void sum_piece_as(const RowsItem& item, const SortedEntries& s, int64_t begin, int64_t end,
                  T* out) {
  for (int64_t c = 0; c < item.dim; c += kBlock)
    sum_entries(item, s, begin, end, c, item.dim - c < kBlock ? item.dim - c : kBlock, out + c);
}

void dense(const DenseItem& item, int64_t begin, int64_t end) {
  if (is_double(item.param)) dense_of_type<double>(item, begin, end);
  else dense_of_type<float>(item, begin, end);
}

void rows(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
          int64_t begin, int64_t end) {
  if (is_double(item.param)) rows_of_type<double>(item, sorted, long_runs, begin, end);
  else rows_of_type<float>(item, sorted, long_runs, begin, end);
}

void sum_piece(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end,
               void* out) {
  if (is_double(item.param)) sum_piece_as(item, sorted, begin, end, static_cast<double*>(out));
  else sum_piece_as(item, sorted, begin, end, static_cast<float*>(out));
}

void combine_pieces(const RowsItem& item, void* pieces, int64_t count) {
  if (is_double(item.param)) combine_pieces_as<double>(item, pieces, count);
  else combine_pieces_as<float>(item, pieces, count);
}

}  // namespace
