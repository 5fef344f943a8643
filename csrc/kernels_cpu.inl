// SPDX-License-Identifier: Apache-2.0
//
// The leaf kernels, compiled once per instruction set: each kernels_<isa>.cpp opens a target region
// and includes this file in a namespace of its own. Loops are plain; the compiler vectorises them.
//
// Tensors whose storage is the arithmetic type are updated in place ("native"); all others go
// through blocks of kBlock elements in the L1 cache, so that any mixture of storage types costs one
// conversion loop per type instead of one kernel per combination.

namespace {

constexpr int64_t kBlock = 512;
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
    case Storage::kFloat32: return load_as<T, float>(s.data, offset, index, n, out);
    case Storage::kFloat64: return load_as<T, double>(s.data, offset, index, n, out);
    case Storage::kBFloat16: return load_as<T, BFloat16>(s.data, offset, index, n, out);
    case Storage::kFloat16: return load_as<T, Float16>(s.data, offset, index, n, out);
  }
}

template <typename T>
void store(const Stream& s, int64_t offset, const int64_t* index, int64_t n, const T* in) {
  switch (s.storage) {
    case Storage::kFloat32: return store_as<T, float>(s.data, offset, index, n, in);
    case Storage::kFloat64: return store_as<T, double>(s.data, offset, index, n, in);
    case Storage::kBFloat16: return store_as<T, BFloat16>(s.data, offset, index, n, in);
    case Storage::kFloat16: return store_as<T, Float16>(s.data, offset, index, n, in);
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
  const Rule rule(item.rule);
  if (updates_in_place<T>(item, Rule::kStates) && is_native<T>(item.grad)) {
    T* states[kMaxStates];
    for (int k = 0; k < Rule::kStates; ++k) states[k] = static_cast<T*>(item.states[k].data) + begin;
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

template <typename T>
TIGER_EXT_INLINE void prefetch_span(const T* start, int64_t count, int64_t max_lines) {
  const uintptr_t end = reinterpret_cast<uintptr_t>(start + count);
  uintptr_t line = reinterpret_cast<uintptr_t>(start) & ~static_cast<uintptr_t>(kCacheLine - 1);
  for (int64_t i = 0; line < end && i < max_lines; line += kCacheLine, ++i)
    __builtin_prefetch(reinterpret_cast<const void*>(line), 1, 3);
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
      prefetch_span(values + (sorted.position(i + ahead) - first_entry) * stride, kWidth, kWidth);
    for (int w = 0; w < kWidth; ++w) sum[w] += row[w];
  }
  for (int w = 0; w < kWidth; ++w) out[w] = sum[w];
}

// The sum of entries [begin, end), at most kPiece of them, columns [column, column + n), n <= kBlock.
template <typename T>
void sum_entries(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end,
                 int64_t column, int64_t n, T* out) {
  if (is_native<T>(item.values)) {
    constexpr int64_t kAhead = 8;
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
  if (low < runs.size && runs.data[low].begin == begin) return static_cast<const T*>(runs.data[low].sum);
  return nullptr;
}

template <typename T, typename Rule, bool kInPlace>
void rows_span(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
               int64_t begin, int64_t end) {
  const Rule rule(item.rule);
  const int64_t dim = item.dim;
  const int64_t limit = item.first_entry + item.entries;
  const bool native_values = is_native<T>(item.values);
  T* const param = static_cast<T*>(item.param.data);
  alignas(kCacheLine) T sum[kBlock];

  // Rows are far apart: fetch those of the next entries while this one is computed. Beyond a few
  // lines of a row the hardware's own prefetcher follows.
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = row_bytes >= 4096 ? 1 : row_bytes >= 1024 ? 2 : row_bytes >= 128 ? 1024 / row_bytes + 2 : 16;
  constexpr int64_t kMaxLines = 16;
  int64_t prefetched = begin;
  uint64_t prefetched_row = ~uint64_t{0};
  const auto prefetch_until = [&](int64_t until) {
    for (; prefetched < until; ++prefetched) {
      if (native_values)
        prefetch_span(static_cast<const T*>(item.values.data) +
                          (sorted.position(prefetched) - item.first_entry) * item.value_stride,
                      dim, kMaxLines);
      const uint64_t row = sorted.row(prefetched);
      if (!kInPlace || row == prefetched_row) continue;
      prefetched_row = row;
      const int64_t r = static_cast<int64_t>(row) - item.first_row;
      prefetch_span(param + r * item.param_layout.row_stride, dim, kMaxLines);
      for (int k = 0; k < Rule::kStates; ++k)
        prefetch_span(static_cast<const T*>(item.states[k].data) +
                          r * item.state_layouts[k].row_stride,
                      dim, kMaxLines);
    }
  };

  int64_t i = begin;
  if (i > item.first_entry)  // a run that started before `begin` is not ours
    while (i < end && sorted.row(i) == sorted.row(i - 1)) i = run_end(sorted, i, limit);
  prefetched = i;

  while (i < end) {
    const int64_t next = run_end(sorted, i, limit);
    if (prefetched < next && next - i > ahead) prefetched = next;
    prefetch_until(next + ahead < limit ? next + ahead : limit);

    const int64_t row = static_cast<int64_t>(sorted.row(i)) - item.first_row;
    const T* grad = nullptr;  // the summed row, if it lies somewhere already
    if (next - i == 1 && native_values)
      grad = static_cast<const T*>(item.values.data) +
             (sorted.position(i) - item.first_entry) * item.value_stride;
    else if (next - i > kPiece)
      grad = find_long_run<T>(long_runs, i);

    if constexpr (kInPlace) {
      T* const p = param + row * item.param_layout.row_stride;
      T* states[kMaxStates];
      for (int k = 0; k < Rule::kStates; ++k)
        states[k] = static_cast<T*>(item.states[k].data) + row * item.state_layouts[k].row_stride;
      if (grad) {
        apply(rule, grad, p, states, dim);
      } else {
        for (int64_t c = 0; c < dim; c += kBlock) {
          const int64_t n = dim - c < kBlock ? dim - c : kBlock;
          sum_run(item, sorted, i, next, c, n, sum);
          T* block_states[kMaxStates];
          for (int k = 0; k < Rule::kStates; ++k) block_states[k] = states[k] + c;
          apply(rule, sum, p + c, block_states, n);
        }
      }
    } else {
      const int64_t param_row = item.param_layout.offset(row);
      int64_t state_rows[kMaxStates];
      for (int k = 0; k < Rule::kStates; ++k) state_rows[k] = item.state_layouts[k].offset(row);
      for (int64_t c = 0; c < dim; c += kBlock) {
        const int64_t n = dim - c < kBlock ? dim - c : kBlock;
        if (!grad) sum_run(item, sorted, i, next, c, n, sum);
        // Through an index the block's elements are given from the start of the row's vector.
        const auto start = [c](int64_t row_offset, const int64_t* inner) {
          return inner ? row_offset : row_offset + c;
        };
        const int64_t* const param_index = item.param_layout.inner ? item.param_layout.inner + c : nullptr;
        int64_t state_offsets[kMaxStates];
        const int64_t* state_indices[kMaxStates];
        for (int k = 0; k < Rule::kStates; ++k) {
          const int64_t* inner = item.state_layouts[k].inner;
          state_offsets[k] = start(state_rows[k], inner);
          state_indices[k] = inner ? inner + c : nullptr;
        }
        apply_converted(rule, grad ? grad + c : sum, item.param,
                        start(param_row, item.param_layout.inner), param_index, item.states,
                        state_offsets, state_indices, n);
      }
    }
    i = next;
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
  switch (item.rule.kind) {
    case RuleKind::kSignMomentum: return dense_span<T, SignMomentum<T>>(item, begin, end);
    case RuleKind::kAdamW: return dense_span<T, AdamW<T>>(item, begin, end);
    case RuleKind::kAdamWWithoutMoment1:
      return dense_span<T, AdamWWithoutMoment1<T>>(item, begin, end);
  }
}

template <typename T>
void rows_of_type(const RowsItem& item, const SortedEntries& s, const LongRuns& l, int64_t b, int64_t e) {
  switch (item.rule.kind) {
    case RuleKind::kSignMomentum: return rows_of_rule<T, SignMomentum<T>>(item, s, l, b, e);
    case RuleKind::kAdamW: return rows_of_rule<T, AdamW<T>>(item, s, l, b, e);
    case RuleKind::kAdamWWithoutMoment1:
      return rows_of_rule<T, AdamWWithoutMoment1<T>>(item, s, l, b, e);
  }
}

template <typename T>
void sum_piece_as(const RowsItem& item, const SortedEntries& s, int64_t begin, int64_t end, T* out) {
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

void sum_piece(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end, void* out) {
  if (is_double(item.param)) sum_piece_as(item, sorted, begin, end, static_cast<double*>(out));
  else sum_piece_as(item, sorted, begin, end, static_cast<float*>(out));
}

void combine_pieces(const RowsItem& item, void* pieces, int64_t count) {
  if (is_double(item.param)) combine_pieces_as<double>(item, pieces, count);
  else combine_pieces_as<float>(item, pieces, count);
}

}  // namespace
