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
  if constexpr (Rule::kStates == 0) {
    for (int64_t i = 0; i < n; ++i) rule(T(0), param[i]);
    return;
  } else {
    T* __restrict s0 = states[0];
    if constexpr (Rule::kKind == RuleKind::kMomentum) {
      // The direction is chosen outside the loop.
      rule.with_direction([&]<Direction kDirection>() {
        if (rule.moves)
          for (int64_t i = 0; i < n; ++i)
            rule.template update<kDirection, true>(grad[i], param[i], s0[i]);
        else
          for (int64_t i = 0; i < n; ++i)
            rule.template update<kDirection, false>(grad[i], param[i], s0[i]);
      });
    } else if constexpr (Rule::kStates == 1) {
      for (int64_t i = 0; i < n; ++i) rule(grad[i], param[i], s0[i]);
    } else {
      T* __restrict s1 = states[1];
      for (int64_t i = 0; i < n; ++i) rule(grad[i], param[i], s0[i], s1[i]);
    }
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
  if (moves_param(rule)) load(param, param_offset, param_index, n, p);
  for (int k = 0; k < Rule::kStates; ++k)
    load(states[k], state_offsets[k], state_indices[k], n, s[k]);
  apply(rule, grad, p, pointers, n);
  if (moves_param(rule)) store(param, param_offset, param_index, n, p);
  for (int k = 0; k < Rule::kStates; ++k)
    store(states[k], state_offsets[k], state_indices[k], n, s[k]);
}

// A gradient that is zero everywhere.
template <typename T>
const T* zeros() {
  alignas(kCacheLine) static constexpr T block[kBlock] = {};
  return block;
}

// n <= kBlock elements as T: where they lie, or converted into `buffer`.
template <typename T>
const T* view(const Stream& s, int64_t offset, const int64_t* index, int64_t n, T* buffer) {
  if (!s.data) return zeros<T>();
  if (!index && is_native<T>(s)) return static_cast<const T*>(s.data) + offset;
  load(s, offset, index, n, buffer);
  return buffer;
}

// ------------------------------------------------------------------- looking before the update

// In double and in a fixed order: lane l adds elements l, l + kLanes, ..., then the lanes are
// added.
constexpr int kLanes = 16;

inline double sum_lanes(double* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

template <typename T>
double sum_of_squares(const T* __restrict x, int64_t n) {
  alignas(kCacheLine) double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const double v = static_cast<double>(x[i + l]);
      lanes[l] += v * v;
    }
  for (; i < n; ++i) lanes[i % kLanes] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum_lanes(lanes);
}

template <typename T>
bool all_finite(const T* __restrict x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !(x[i] - x[i] == T(0));
  return bad == 0;
}

// Whether a rule's facts include those of the gradient, of the direction.
inline bool wants_finite(const RuleParams& r) {
  return r.adds && r.nonfinite != Nonfinite::kPropagate;
}
inline bool wants_directions(const RuleParams& r) {
  return r.scale != Scale::kNone && r.direction != Direction::kSign;
}

// The facts of one block. `grad` and `exp_avg` matter only if the rule wants something of them.
template <typename T>
Facts look_at(const RuleParams& r, const Momentum<T>& rule, const T* grad, const T* param,
              const T* exp_avg, int64_t n) {
  Facts facts;
  if (wants_finite(r)) facts.finite = all_finite(grad, n);
  if (r.scale != Scale::kNone) facts.params = sum_of_squares(param, n);
  if (wants_directions(r)) {
    alignas(kCacheLine) T d[kBlock];
    rule.with_direction([&]<Direction kDirection>() {
      for (int64_t i = 0; i < n; ++i)
        d[i] = rule.template direction_at<kDirection>(grad[i], exp_avg[i]);
    });
    facts.directions = sum_of_squares(d, n);
  }
  return facts;
}

// -------------------------------------------------------------------------------- dense road

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

// What skipped steps do to a row, as constants: many rows of a step have skipped the same ones.
// `from` and params.current are steps.
template <typename T, typename Rule>
class CatchUpTable {
 public:
  explicit CatchUpTable(const RowsItem& item) : params_(*item.rule.params), memory_(memory()) {
    for (int k = 0; k < Rule::kStates; ++k) floors_[k] = smallest_kept<T>(item.states[k].storage);
  }

  CatchUp<T> operator()(int32_t from) const {
    Entry& entry = memory_[static_cast<uint32_t>(from) % kEntries];
    const uint64_t key = params_.history << 32 | static_cast<uint32_t>(from);
    if (entry.key != key) fill(entry, key, from);
    CatchUp<T> c = entry.catch_up;
    for (int k = 0; k < Rule::kStates; ++k) c.floor[k] = c.factor[k] == T(0) ? T(0) : floors_[k];
    return c;
  }

 private:
  struct Entry {
    uint64_t key = 0;
    CatchUp<T> catch_up;  // but for the floors, which differ from item to item
  };
  static constexpr int kEntries = 1024;

  static Entry* memory() {
    static thread_local Entry entries[kEntries];
    return entries;
  }

  __attribute__((noinline)) void fill(Entry& entry, uint64_t key, int32_t from) const {
    const SkippedSteps skipped =
        skipped_steps(params_.stretches, params_.stretch_count, from, params_.current);
    entry.catch_up = catch_up_with<T, Rule::kStates>(missed(skipped, Rule::kStates == 2), floors_);
    entry.key = key;
  }

  const RuleParams& params_;
  Entry* const memory_;
  T floors_[kMaxStates] = {};
};

// Updates one row at a time, after a look at it if its rule asks for one.
template <typename T, typename Rule, bool kInPlace>
class RowUpdate {
 public:
  explicit RowUpdate(const RowsItem& item)
      : item_(item),
        params_(*item.rule.params),
        rule_(params_),
        catch_up_(item),
        careful_(params_.looks() || item.rule.window) {}

  // grad_of(column, n) is block [column, column + n) of the row's summed gradient.
  template <typename GradOf>
  TIGER_EXT_INLINE void operator()(int64_t row, const GradOf& grad_of) const {
    const Place at = place(row);
    if (!careful_) return update_current(rule_, row, at, grad_of);
    Rule own = rule_;
    if (decide(own, row, at, grad_of)) update_current(own, row, at, grad_of);
  }

  // Only the catch-up. Returns whether there was one. Threads may share rows.
  bool catch_up(int64_t row) const {
    int32_t* const last = item_.rule.last_step + row;
    const int32_t current = params_.current;
    int32_t old = __atomic_load_n(last, __ATOMIC_RELAXED);
    if (current_up_to(old) >= current) return false;
    const int32_t now = old < 0 ? -1 - current : current;
    if (!__atomic_compare_exchange_n(last, &old, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return false;  // another thread does it
    const CatchUp<T> missed = catch_up_(current_up_to(old));
    update(NoUpdate<T, Rule::kStates>(), &missed, place(row),
           [](int64_t, int64_t) { return zeros<T>(); });
    return true;
  }

 private:
  struct Place {  // where the row's vectors start
    int64_t param;
    int64_t states[kMaxStates];
  };

  Place place(int64_t row) const {
    Place at;
    at.param = item_.param_layout.offset(row);
    for (int k = 0; k < Rule::kStates; ++k) at.states[k] = item_.state_layouts[k].offset(row);
    return at;
  }

  // The update of a row, which first catches up with the steps it skipped.
  template <typename GradOf>
  TIGER_EXT_INLINE void update_current(const Rule& rule, int64_t row, const Place& at,
                                       const GradOf& grad_of) const {
    CatchUp<T> missed;
    bool behind = false;
    if (item_.rule.last_step) {
      int32_t& last = item_.rule.last_step[row];
      const int32_t from = current_up_to(last);
      last = params_.updated();
      behind = from < params_.current;
      if (behind) missed = catch_up_(from);
    }
    update(rule, behind ? &missed : nullptr, at, grad_of);
  }

  // `missed`: null if the row is current.
  template <typename AnyRule, typename GradOf>
  TIGER_EXT_INLINE void update(const AnyRule& rule, const CatchUp<T>* missed, const Place& at,
                               const GradOf& grad_of) const {
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      const T* const grad = grad_of(c, n);
      after(rule, missed, [&](const auto& whole) {
        if constexpr (kInPlace) {
          T* states[kMaxStates];
          for (int k = 0; k < Rule::kStates; ++k)
            states[k] = static_cast<T*>(item_.states[k].data) + at.states[k] + c;
          apply(whole, grad, static_cast<T*>(item_.param.data) + at.param + c, states, n);
        } else {
          int64_t state_offsets[kMaxStates];
          const int64_t* state_indices[kMaxStates];
          for (int k = 0; k < Rule::kStates; ++k) {
            state_offsets[k] = offset(item_.state_layouts[k], at.states[k], c);
            state_indices[k] = index(item_.state_layouts[k], c);
          }
          apply_converted(whole, grad, item_.param, offset(item_.param_layout, at.param, c),
                          index(item_.param_layout, c), item_.states, state_offsets, state_indices,
                          n);
        }
      });
    }
  }

  // f(the rule, after the catch-up if there is one).
  template <typename AnyRule, typename F>
  TIGER_EXT_INLINE void after(const AnyRule& rule, const CatchUp<T>* missed, const F& f) const {
    if (!missed) return f(rule);
    if constexpr (std::is_base_of_v<Momentum<T>, Rule>)
      if (params_.lazy == Lazy::kExact) return f(AfterCatchUp<T, AnyRule, true>(rule, *missed));
    f(AfterCatchUp<T, AnyRule, false>(rule, *missed));
  }

  // Whether the row is to be updated, and by which rule. Shrinks it if that is the verdict.
  template <typename GradOf>
  __attribute__((noinline)) bool decide(Rule& rule, int64_t row, const Place& at,
                                        const GradOf& grad_of) const {
    int32_t* const window = item_.rule.window ? item_.rule.window + row : nullptr;
    if constexpr (std::is_base_of_v<Momentum<T>, Rule>) {
      if (window) {
        const bool in_window = *window == params_.window;
        if (!in_window && !params_.adds) return false;
        if (in_window) rule.stop_decay();
      }
    }
    if (params_.looks()) {
      const Facts facts = look(rule, at, grad_of);
      const Verdict verdict = judge(params_, facts);
      if (verdict == Verdict::kShrink) {
        if (item_.rule.last_step) catch_up(row);
        shrink(at);
      }
      if (verdict != Verdict::kUpdate) return false;
      if constexpr (std::is_base_of_v<Momentum<T>, Rule>)
        if (params_.scale != Scale::kNone) rule.scale(facts.rate(params_, item_.dim));
    }
    if (window && params_.adds) *window = params_.window;
    return true;
  }

  template <typename GradOf>
  Facts look(const Rule& rule, const Place& at, const GradOf& grad_of) const {
    Facts facts;
    alignas(kCacheLine) T param[kBlock], exp_avg[kBlock];
    const bool directions = wants_directions(params_);
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      const T* const g = directions || wants_finite(params_) ? grad_of(c, n) : nullptr;
      const T* p = nullptr;
      const T* m = nullptr;
      if (params_.scale != Scale::kNone)
        p = view(item_.param, offset(item_.param_layout, at.param, c), index(item_.param_layout, c),
                 n, param);
      if (directions)
        m = view(item_.states[0], offset(item_.state_layouts[0], at.states[0], c),
                 index(item_.state_layouts[0], c), n, exp_avg);
      if constexpr (std::is_base_of_v<Momentum<T>, Rule>)
        facts.add(look_at<T>(params_, rule, g, p, m, n));
      else facts.add(look_at<T>(params_, Momentum<T>(), g, p, m, n));
    }
    return facts;
  }

  void shrink(const Place& at) const {
    const Shrink<T> rule(params_);
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      apply_converted<T>(rule, nullptr, item_.param, offset(item_.param_layout, at.param, c),
                         index(item_.param_layout, c), nullptr, nullptr, nullptr, n);
    }
  }

  // Through an index, offsets count from the start of the row's vector.
  static int64_t offset(const RowLayout& layout, int64_t start, int64_t c) {
    return layout.inner ? start : start + c;
  }
  static const int64_t* index(const RowLayout& layout, int64_t c) {
    return layout.inner ? layout.inner + c : nullptr;
  }

  const RowsItem& item_;
  const RuleParams& params_;
  const Rule rule_;
  const CatchUpTable<T, Rule> catch_up_;
  const bool careful_;
};

struct NoPrefetch {
  TIGER_EXT_INLINE void near(int64_t) const {}
  NoPrefetch(const RowsItem&, const SortedEntries&, int64_t) {}
  TIGER_EXT_INLINE void operator()(int64_t, int64_t, int64_t, int64_t) {}
};

// f(row, grad_of) for every run that starts in [begin, end) of the sorted entries, where
// grad_of(column, n) is a block of the run's sum. Stops when f returns false.
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

    const auto grad_of = [&](int64_t c, int64_t n) __attribute__((always_inline)) -> const T* {
      prefetch(i, next, c, n);
      if (!item.values.data) return zeros<T>();
      if (grad) return grad + c;
      if (c != summed) sum_run(item, sorted, i, next, c, n, sum);
      summed = c;
      return sum;
    };
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
    const auto grad_of = [&](int64_t c, int64_t n) -> const T* {
      return view(item.values, row * item.value_stride + c, nullptr, n, buffer);
    };
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
      for (int64_t k = 0; k < count && k < kRowsAhead; ++k) fetch<kInPlace>(item, behind[k]);
      for (int64_t k = 0; k < count; ++k) {
        if (k + kRowsAhead < count) fetch<kInPlace>(item, behind[k + kRowsAhead]);
        written += update.catch_up(behind[k]);
      }
    }
    return written;
  }

  template <bool kInPlace>
  static TIGER_EXT_INLINE void fetch(const RowsItem& item, int64_t row) {
    if constexpr (kInPlace) {
      const int64_t bytes = item.dim * static_cast<int64_t>(sizeof(T));
      const int64_t reach = bytes < 1024 ? bytes : 1024;
      prefetch_bytes(static_cast<const T*>(item.param.data) + item.param_layout.offset(row), reach);
      for (int k = 0; k < Rule::kStates; ++k)
        prefetch_bytes(
            static_cast<const T*>(item.states[k].data) + item.state_layouts[k].offset(row), reach);
    }
  }
};

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

// f.template operator()<T, Rule>()
template <typename T, typename F>
void with_rule_of(RuleKind kind, const F& f) {
  switch (kind) {
    case RuleKind::kSignMomentum:
      return f.template operator()<T, SignMomentum<T>>();
    case RuleKind::kAdamW:
      return f.template operator()<T, AdamW<T>>();
    case RuleKind::kAdamWWithoutMoment1:
      return f.template operator()<T, AdamWWithoutMoment1<T>>();
    case RuleKind::kMomentum:
      return f.template operator()<T, Momentum<T>>();
    case RuleKind::kShrink:
      return f.template operator()<T, Shrink<T>>();
  }
}

template <typename Item, typename F>
void with_rule(const Item& item, const F& f) {
  if (is_double(item.param)) with_rule_of<double>(item.rule.params->kind, f);
  else with_rule_of<float>(item.rule.params->kind, f);
}

template <typename T>
void sum_piece_as(const RowsItem& item, const SortedEntries& s, int64_t begin, int64_t end,
                  T* out) {
  for (int64_t c = 0; c < item.dim; c += kBlock)
    sum_entries(item, s, begin, end, c, item.dim - c < kBlock ? item.dim - c : kBlock, out + c);
}

// For for_each_run and for_each_touched_row: stops at the first row that is not finite.
template <typename T>
struct FindNonfinite {
  const RowsItem& item;
  bool& finite;

  template <typename GradOf>
  bool operator()(int64_t, const GradOf& grad_of) const {
    for (int64_t c = 0; c < item.dim && finite; c += kBlock) {
      const int64_t n = item.dim - c < kBlock ? item.dim - c : kBlock;
      finite = all_finite(grad_of(c, n), n);
    }
    return finite;
  }
};

// ---------------------------------------------------------------------------- the table's entries

void dense(const DenseItem& item, int64_t begin, int64_t end) {
  with_rule(item, [&]<typename T, typename Rule>() { dense_span<T, Rule>(item, begin, end); });
}

Facts look(const DenseItem& item, int64_t begin, int64_t end) {
  return is_double(item.param) ? look_at_span<double>(item, begin, end)
                               : look_at_span<float>(item, begin, end);
}

void rows(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
          int64_t begin, int64_t end) {
  with_rule(item, [&]<typename T, typename Rule>() {
    if constexpr (Rule::kStates > 0)
      RowsOfRule<T, Rule>::sorted(item, sorted, long_runs, begin, end);
  });
}

void direct(const RowsItem& item, int64_t begin, int64_t end) {
  with_rule(item, [&]<typename T, typename Rule>() {
    if constexpr (Rule::kStates > 0) RowsOfRule<T, Rule>::direct(item, begin, end);
  });
}

int64_t catch_up(const RowsItem& item, const int64_t* ids, int64_t begin, int64_t end) {
  int64_t written = 0;
  with_rule(item, [&]<typename T, typename Rule>() {
    if constexpr (Rule::kStates > 0) written = CatchUpOfRule<T, Rule>::run(item, ids, begin, end);
  });
  return written;
}

bool rows_finite(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
                 int64_t begin, int64_t end) {
  bool finite = true;
  if (is_double(item.param))
    for_each_run<double, NoPrefetch>(item, sorted, long_runs, begin, end,
                                     FindNonfinite<double>{item, finite});
  else
    for_each_run<float, NoPrefetch>(item, sorted, long_runs, begin, end,
                                    FindNonfinite<float>{item, finite});
  return finite;
}

bool direct_finite(const RowsItem& item, int64_t begin, int64_t end) {
  bool finite = true;
  if (is_double(item.param))
    for_each_touched_row<double>(item, begin, end, FindNonfinite<double>{item, finite});
  else for_each_touched_row<float>(item, begin, end, FindNonfinite<float>{item, finite});
  return finite;
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

#include "row_norms_cpu.inl"

constexpr CpuKernels table(const char* name) {
  return {name,          dense,    look,      rows,           rows_finite,        direct,
          direct_finite, catch_up, sum_piece, combine_pieces, repeated_rows_norm, other_rows_norm};
}

}  // namespace
