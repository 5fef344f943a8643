// SPDX-License-Identifier: Apache-2.0
//
// The rows road on CUDA: sums each touched row's entries and updates the row in place.
//
// A block takes a tile of the sorted entries (and, of very long rows, a tile of the columns), finds
// the rows that begin in it, and shares them out among groups of lanes: a whole warp for long rows,
// a few lanes for short ones. So work is cut by entries, not by rows, and no list of rows is ever
// built. Rows of more than kPiece entries are summed beforehand, piece by piece, by groups of
// their own: one row with a million entries keeps the whole device busy.
#include <type_traits>

#include "cuda/lazy_rows.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/roads.h"
#include "cuda/row_tables.cuh"
#include "cuda/rules.cuh"

namespace tiger_ext {
namespace {

// ------------------------------------------------------------------------------------ long runs
//
// A run is the entries of one row. One of more than kPiece entries is long. Of each kPiece
// neighbouring entries (a slot) at most one is the first of a long run, and at most one the first
// of a later piece of a long run. So pieces need no list either: slot q keeps at 2q the sum of the
// later piece that begins in it, and at 2q + 1 that of the first piece, to which all the later
// ones, in neighbouring slots, are added in the end.

// The long run, if any, that begins in slot q: its first entry, or -1.
__device__ int64_t long_run_begin(const Entries& sorted, const TableEntries& t, int64_t q) {
  const int64_t next = (q + 1) * kPiece;
  if (next >= t.entries) return -1;
  const uint64_t row = sorted.row(next);
  if (sorted.row(next - 1) != row || row == t.dropped_row) return -1;
  const int64_t begin = sorted.lower_bound(q * kPiece, next, row);
  if (begin == q * kPiece && begin > 0 && sorted.row(begin - 1) == row) return -1;
  return begin + kPiece < t.entries && sorted.row(begin + kPiece) == row ? begin : -1;
}

// The first entry of the later piece of a long run that begins in slot q, or -1.
__device__ int64_t later_piece_begin(const Entries& sorted, const TableEntries& t, int64_t q) {
  const int64_t first = q * kPiece;
  if (q == 0) return -1;
  const uint64_t row = sorted.row(first);
  if (sorted.row(first - 1) != row || row == t.dropped_row) return -1;
  const int64_t begin = sorted.lower_bound(0, first, row);
  const int64_t piece = begin + (first - begin + kPiece - 1) / kPiece * kPiece;
  return piece < t.entries && sorted.row(piece) == row ? piece : -1;
}

// Threads that work on one slot, each on every `lanes`-th column.
int lanes_for_columns(int dim) {
  int lanes = 1;
  while (lanes < kThreads && lanes < dim) lanes *= 2;
  return lanes;
}

struct LongRunItem {
  TableEntries table;
  int lanes;
};

// Shared by the two kernels below: which slot and columns a thread has.
struct SlotShare {
  int64_t slot;
  int column, end;

  __device__ SlotShare(const LongRunItem& item, uint32_t block) {
    const uint32_t tiles = column_tiles(item.table.dim);
    const int tile = static_cast<int>(block % tiles);
    slot = static_cast<int64_t>(block / tiles) * (kThreads / item.lanes) +
           static_cast<int>(threadIdx.x) / item.lanes;
    column = tile * kColumnTile + static_cast<int>(threadIdx.x) % item.lanes;
    end = column_end(tile, item.table.dim);
  }

  // Blocks for `count` slots of an item.
  static int64_t blocks(const LongRunItem& item, int64_t count) {
    const int64_t per_block = kThreads / item.lanes;
    return (count + per_block - 1) / per_block * column_tiles(item.table.dim);
  }
};

// Sums the pieces of long runs, left to right.
template <typename T>
struct SumPieces {
  using Item = LongRunItem;
  static constexpr int kSharedBytes = 0, kMinBlocks = sizeof(T) == 4 ? 4 : 3;

  Entries all;

  int64_t blocks(const Item& item) const {
    return SlotShare::blocks(item, 2 * slots(item.table.entries));
  }

  __device__ void operator()(const Item& item, uint32_t block) const {
    const TableEntries& t = item.table;
    const SlotShare share(item, block);
    const int64_t q = share.slot / 2;
    if (q >= slots(t.entries)) return;
    const Entries sorted = t.sorted(all);
    const bool first_piece = share.slot % 2 == 1;
    const int64_t begin =
        first_piece ? long_run_begin(sorted, t, q) : later_piece_begin(sorted, t, q);
    if (begin < 0) return;
    const int64_t limit = begin + kPiece < t.entries ? begin + kPiece : t.entries;
    const int64_t end =
        first_piece ? limit : sorted.lower_bound(begin, limit, sorted.row(begin) + 1);
    T* const out = static_cast<T*>(t.sums) + share.slot * t.dim;
    for (int c = share.column; c < share.end; c += item.lanes)
      out[c] = sum(t, sorted, begin, end, c);
  }

 private:
  __device__ static T value(const TableEntries& t, const Entries& sorted, int64_t i, int c) {
    T x[1];
    load_vector<Any>(t.values, sorted.entry(i) * t.value_stride + c, true, x);
    return x[0];
  }

  __device__ static T sum(const TableEntries& t, const Entries& sorted, int64_t begin, int64_t end,
                          int c) {
    constexpr int kInFlight = 8;
    T total = value(t, sorted, begin, c);
    int64_t i = begin + 1;
    for (; i + kInFlight <= end; i += kInFlight) {
      T x[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) x[k] = value(t, sorted, i + k, c);
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) total += x[k];
    }
    for (; i < end; ++i) total += value(t, sorted, i, c);
    return total;
  }
};

// Adds the later pieces of each long run to its first, left to right.
template <typename T>
struct CombinePieces {
  using Item = LongRunItem;
  static constexpr int kSharedBytes = 0, kMinBlocks = sizeof(T) == 4 ? 4 : 3;

  Entries all;

  int64_t blocks(const Item& item) const {
    return SlotShare::blocks(item, slots(item.table.entries));
  }

  __device__ void operator()(const Item& item, uint32_t block) const {
    const TableEntries& t = item.table;
    const SlotShare share(item, block);
    if (share.slot >= slots(t.entries)) return;
    const Entries sorted = t.sorted(all);
    const int64_t begin = long_run_begin(sorted, t, share.slot);
    if (begin < 0) return;
    const int64_t end = sorted.lower_bound(begin, t.entries, sorted.row(begin) + 1);
    const int64_t later = slots(end - begin) - 1;
    T* const first = static_cast<T*>(t.sums) + (2 * share.slot + 1) * t.dim;
    const T* const pieces = static_cast<const T*>(t.sums) + 2 * (share.slot + 1) * t.dim;
    for (int c = share.column; c < share.end; c += item.lanes) {
      constexpr int kInFlight = 16;
      T total = first[c];
      int64_t k = 0;
      for (; k + kInFlight <= later; k += kInFlight) {
        T x[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) x[j] = pieces[2 * (k + j) * t.dim + c];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) total += x[j];
      }
      for (; k < later; ++k) total += pieces[2 * k * t.dim + c];
      first[c] = total;
    }
  }
};

// --------------------------------------------------------------------------------------- update

// One table. Its streams: parameter, states.
template <typename Rule, typename Rows>
struct RowsWork {
  RuleSlot<Rule> rule;
  LazyTable lazy;
  TableEntries table;
  Stream streams[1 + Rule::kStates];
  Rows rows[1 + Rule::kStates];
  uint64_t first_row;
  int tile;   // entries of a block, at most kThreads
  int lanes;  // of a row: a power of two, at most a warp
};

// The rows that begin in a tile, and what each has missed.
template <typename T>
struct LazyRowsOfTile : RowsOfTile {
  RowGap<T> gaps[kThreads];
};

template <typename T, typename Rule, typename Access, int kWidth, typename Rows, bool kLazy>
struct RowsUpdate {
  using Item = RowsWork<Rule, Rows>;
  using TileRows = std::conditional_t<kLazy, LazyRowsOfTile<T>, RowsOfTile>;
  static constexpr bool kNative = !std::is_same_v<Access, Any>;
  static constexpr int kInFlight = kNative ? 8 : 4;  // entries of a row that are read at a time
  static constexpr int kSharedBytes = sizeof(TileRows);
  static constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : kLazy || !kNative || kWidth == 1 ? 3 : 4;

  Entries all;
  const float* found_inf;

  int64_t blocks(const Item& item) const {
    return (item.table.entries + item.tile - 1) / item.tile * column_tiles(item.table.dim);
  }

  __device__ void operator()(const Item& item, uint32_t block) const {
    if (step_cancelled(found_inf)) return;
    const TableEntries& t = item.table;
    const uint32_t tiles = column_tiles(t.dim);
    const int64_t begin = static_cast<int64_t>(block / tiles) * item.tile;
    const int column_tile = static_cast<int>(block % tiles);
    TileRows& rows = shared_memory<TileRows>();
    const Entries tile = t.sorted(all).from(begin);
    const int count = find_rows(item.table.entries, item.tile, tile, begin, rows);
    if constexpr (kLazy) {
      look_up_gaps(item, tile, count, rows);
      __syncthreads();
    }

    const int column =
        column_tile * kColumnTile + static_cast<int>(threadIdx.x) % item.lanes * kWidth;
    const int end = column_end(column_tile, t.dim);
    for (int k = static_cast<int>(threadIdx.x) / item.lanes; k < count;
         k += kThreads / item.lanes) {
      const int first = rows.begins[k], length = rows.begins[k + 1] - first;
      const uint64_t row = tile.row(first);
      if (row == t.dropped_row) continue;
      const RowGap<T>* gap = nullptr;
      if constexpr (kLazy) gap = &rows.gaps[k];
      for (int c = column; c < end; c += item.lanes * kWidth)
        update(item, tile.from(first), begin + first, length,
               static_cast<int64_t>(row - item.first_row), c, gap);
    }
  }

 private:
  using Values = RunValues<T, Access, kWidth>;

  // One thread a row, so that the arithmetic of many rows goes side by side. Sets the clocks: lazy
  // tables have one tile of columns, so that no other block reads them.
  __device__ static void look_up_gaps(const Item& item, const Entries& tile, int count,
                                      TileRows& rows) {
    const int k = static_cast<int>(threadIdx.x);
    if (k >= count) return;
    const uint64_t row = tile.row(rows.begins[k]);
    if (row == item.table.dropped_row) return;
    int32_t* const last = item.lazy.last_step + (row - item.first_row);
    rows.gaps[k].template look_up<Rule::kStates>(item.lazy, *last, item.streams + 1);
    *last = item.lazy.updated();
  }

  // Columns [c, c + kWidth) of the row whose entries are the first `length` of `run`.
  __device__ static void update(const Item& item, const Entries& run, int64_t first, int length,
                                int64_t row, int c, const RowGap<T>* gap) {
    const TableEntries& t = item.table;
    T grad[kWidth], param[kWidth], states[Rule::kStates][kWidth];
    int i = 1;
    if (length > kPiece) {
      const T* const sum = static_cast<const T*>(t.sums) + (2 * (first / kPiece) + 1) * t.dim + c;
      load_packed(sum, true, grad);
      i = length;
    } else {
      Values::load(t, run, 0, c, grad);
      for (; i + kInFlight <= length; i += kInFlight)
        Values::template add<kInFlight>(t, run, i, c, grad);
      for (; i + kInFlight / 2 <= length; i += kInFlight / 2)
        Values::template add<kInFlight / 2>(t, run, i, c, grad);
    }
    // Only here, so that many entries can be in flight above; few entries are so together with
    // these.
    load_vector<Access>(item.streams[0], item.rows[0].offset(row, c), true, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k)
      load_vector<Access>(item.streams[1 + k], item.rows[1 + k].offset(row, c), true, states[k]);
    for (; i + 2 <= length; i += 2) Values::template add<2>(t, run, i, c, grad);
    if (i < length) Values::template add<1>(t, run, i, c, grad);
    if constexpr (kLazy)
      if (gap->behind) gap->apply(item.lazy, param, states);
    apply_rule(item.rule.get(), grad, param, states);
    store_vector<Access>(item.streams[0], item.rows[0].offset(row, c), true, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k)
      store_vector<Access>(item.streams[1 + k], item.rows[1 + k].offset(row, c), true, states[k]);
  }
};

// ----------------------------------------------------------------------------------------- host

// The works of one rule and arithmetic type, lazy ones or others, by the kernel that fits.
template <typename T, typename Rule, bool kLazy>
class Works {
 public:
  void add(const RowsItem& item, void* sums, const void* resolved) {
    bool strided = true;
    bool aligned = is_aligned(item.values, item.value_stride, item.dim, kWide);
    bool native = item.values.storage == kNative;
    const auto look = [&](const Stream& s, const RowLayout& layout) {
      strided = strided && is_strided(layout);
      aligned = aligned && is_aligned(s, layout.row_stride, item.dim, kWide);
      native = native && s.storage == kNative;
    };
    look(item.param, item.param_layout);
    for (int k = 0; k < Rule::kStates; ++k) look(item.states[k], item.state_layouts[k]);

    if (strided && aligned && native)
      native_.push_back(work<StridedRows>(item, sums, resolved, kWide));
    else if (strided && aligned) wide_.push_back(work<StridedRows>(item, sums, resolved, kWide));
    else if (strided && native) scalar_.push_back(work<StridedRows>(item, sums, resolved, 1));
    else any_.push_back(work<AnyRows>(item, sums, resolved, 1));
  }

  void launch(const SortedEntriesCuda& sorted, const DeviceContext& context) const {
    launch<Fixed<kNative>, kWide>(native_, sorted, context);
    launch<Fixed<kNative>, 1>(scalar_, sorted, context);
    launch<Any, kWide>(wide_, sorted, context);
    launch<Any, 1>(any_, sorted, context);
  }

 private:
  static constexpr Storage kNative = sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32;
  static constexpr int kWide = 16 / sizeof(T);

  template <typename Rows>
  static RowsWork<Rule, Rows> work(const RowsItem& item, void* sums, const void* resolved,
                                   int width) {
    RowsWork<Rule, Rows> w{};
    w.rule = {*item.rule.params, resolved};
    w.lazy = LazyTable(item.rule);
    w.table = table_entries(item, sums);
    w.streams[0] = item.param;
    set_layout(w.rows[0], item.param_layout);
    for (int k = 0; k < Rule::kStates; ++k) {
      w.streams[1 + k] = item.states[k];
      set_layout(w.rows[1 + k], item.state_layouts[k]);
    }
    w.first_row = static_cast<uint64_t>(item.first_row);
    w.lanes = 1;
    while (w.lanes < kWarp && w.lanes * width < item.dim) w.lanes *= 2;
    w.tile = tile_entries(item.entries, w.table.dim, w.lanes);
    return w;
  }

  template <typename Access, int kWidth, typename Rows>
  static void launch(const std::vector<RowsWork<Rule, Rows>>& works,
                     const SortedEntriesCuda& sorted, const DeviceContext& context) {
    multi_tensor_apply(works,
                       RowsUpdate<T, Rule, Access, kWidth, Rows, kLazy>{
                           {sorted.keys, sorted.entry_bits}, context.found_inf},
                       context.stream);
  }

  std::vector<RowsWork<Rule, StridedRows>> native_, scalar_, wide_;
  std::vector<RowsWork<Rule, AnyRows>> any_;
};

template <typename T>
void sum_long_runs(const std::vector<RowsItem>& items, const std::vector<void*>& sums,
                   const SortedEntriesCuda& sorted, cudaStream_t stream) {
  std::vector<LongRunItem> work;
  for (size_t i = 0; i < items.size(); ++i) {
    const RowsItem& item = items[i];
    if (!sums[i] || (item.param.storage == Storage::kFloat64) != (sizeof(T) == 8)) continue;
    const TableEntries table = table_entries(item, sums[i]);
    work.push_back({table, lanes_for_columns(table.dim)});
  }
  multi_tensor_apply(work, SumPieces<T>{{sorted.keys, sorted.entry_bits}}, stream);
  multi_tensor_apply(work, CombinePieces<T>{{sorted.keys, sorted.entry_bits}}, stream);
}

}  // namespace

void RowsRoadCuda::prepare(const std::vector<RowsItem>& items, const SortedEntriesCuda& sorted,
                           const DeviceContext& context) {
  items_ = &items;
  context_ = &context;
  sorted_ = sorted;
  for (const RowsItem& item : items) {
    const int64_t size = item.param.storage == Storage::kFloat64 ? 8 : 4;
    sums_.push_back(item.entries > kPiece && item.dim > 0 && item.values.data
                        ? context.allocate(2 * slots(item.entries) * item.dim * size)
                        : nullptr);
  }
}

void RowsRoadCuda::run(const RulesOnDevice& rules) const {
  if (!items_) return;
  sum_long_runs<float>(*items_, sums_, sorted_, context_->stream);
  sum_long_runs<double>(*items_, sums_, sorted_, context_->stream);
  for_each_type_and_rule([&]<typename T, typename Rule>() {
    if constexpr (!Rule::kDirected) {  // they need care
      Works<T, Rule, false> works;
      Works<T, Rule, true> lazy_works;
      for (size_t i = 0; i < items_->size(); ++i) {
        const RowsItem& item = (*items_)[i];
        if (item.dim == 0 || !is_updated_by<T, Rule>(item.rule, item.param) || needs_care(item))
          continue;
        if (item.rule.last_step) lazy_works.add(item, sums_[i], rules.rows(i));
        else works.add(item, sums_[i], rules.rows(i));
      }
      works.launch(sorted_, *context_);
      lazy_works.launch(sorted_, *context_);
    }
  });
  std::vector<CarefulRows> careful;
  for (size_t i = 0; i < items_->size(); ++i)
    if (needs_care((*items_)[i])) careful.push_back({&(*items_)[i], sums_[i], rules.rows(i), 0});
  update_careful_rows(careful, sorted_, *context_);
}

void RowsRoadCuda::find_nonfinite(int32_t* bad, int32_t first) const {
  if (!items_) return;
  sum_long_runs<float>(*items_, sums_, sorted_, context_->stream);
  sum_long_runs<double>(*items_, sums_, sorted_, context_->stream);
  std::vector<CarefulRows> rows;
  for (size_t i = 0; i < items_->size(); ++i) {
    const RowsItem& item = (*items_)[i];
    if (item.rule.params->nonfinite == Nonfinite::kRaise && item.values.data)
      rows.push_back({&item, sums_[i], nullptr, first + static_cast<int32_t>(i)});
  }
  tiger_ext::find_nonfinite(rows, sorted_, bad, *context_);
}

}  // namespace tiger_ext
