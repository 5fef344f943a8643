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

#include "multi_tensor.cuh"
#include "roads_cuda.h"
#include "rules_cuda.cuh"
#include "vectors.cuh"

namespace tiger_ext {
namespace {

constexpr int kColumnTile = 1024;  // columns of a block's work
constexpr int64_t kTargetBlocks = 2048;
constexpr int kTileElements = 32768;  // of a block, when there are more blocks than the target

TIGER_EXT_INLINE uint32_t column_tiles(int dim) {
  return static_cast<uint32_t>(dim + kColumnTile - 1) / kColumnTile;
}
TIGER_EXT_INLINE int column_end(int tile, int dim) {
  return dim - tile * kColumnTile < kColumnTile ? dim : (tile + 1) * kColumnTile;
}

// ------------------------------------------------------------------------------- sorted entries

// The sorted entries of one table, or from some entry on.
struct Entries {
  const uint64_t* keys;
  int entry_bits;

  __device__ uint64_t row(int64_t i) const { return keys[i] >> entry_bits; }
  __device__ int64_t entry(int64_t i) const {
    return static_cast<int64_t>(keys[i] & ((uint64_t{1} << entry_bits) - 1));
  }
  __device__ Entries from(int64_t i) const { return {keys + i, entry_bits}; }
  // The first of [begin, end) whose row is at least `wanted`.
  __device__ int64_t lower_bound(int64_t begin, int64_t end, uint64_t wanted) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (row(middle) < wanted) begin = middle + 1;
      else end = middle;
    }
    return begin;
  }
};

// What the two kernels of long runs and the update have in common: one table's entries.
struct TableEntries {
  Stream values;
  int64_t value_stride;
  int64_t entries;
  int64_t first_entry;
  uint64_t dropped_row;  // the row that does not exist
  void* sums;            // [2 * slots, dim] in the arithmetic type, see below
  int dim;

  __device__ Entries sorted(const Entries& all) const { return all.from(first_entry); }
};

// ------------------------------------------------------------------------------------ long runs
//
// A run is the entries of one row. One of more than kPiece entries is long. Of each kPiece
// neighbouring entries (a slot) at most one is the first of a long run, and at most one the first
// of a later piece of a long run. So pieces need no list either: slot q keeps at 2q the sum of the
// later piece that begins in it, and at 2q + 1 that of the first piece, to which all the later
// ones, in neighbouring slots, are added in the end.

TIGER_EXT_INLINE int64_t slots(int64_t entries) { return (entries + kPiece - 1) / kPiece; }

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

// Where row r lies: contiguous, at a fixed distance from the next.
struct StridedRows {
  int64_t row_stride;
  __device__ int64_t offset(int64_t row, int64_t column) const { return row * row_stride + column; }
};

// Where element (row, column) lies in a table of any strides.
struct AnyRows {
  int64_t row_stride;
  int8_t row_dims, inner_dims;  // 0: row * row_stride, + column
  int64_t sizes[2][kMaxSeparateDims];
  int64_t strides[2][kMaxSeparateDims];

  __device__ int64_t offset(int64_t row, int64_t column) const {
    return (row_dims == 0 ? row * row_stride : unravel(0, row_dims, row)) +
           (inner_dims == 0 ? column : unravel(1, inner_dims, column));
  }

 private:
  __device__ int64_t unravel(int which, int dims, int64_t index) const {
    int64_t result = 0;
    for (int d = dims; d-- > 0;) {
      result += index % sizes[which][d] * strides[which][d];
      index /= sizes[which][d];
    }
    return result;
  }
};

void set_layout(StridedRows& rows, const RowLayout& layout) { rows.row_stride = layout.row_stride; }

void set_layout(AnyRows& rows, const RowLayout& layout) {
  rows.row_stride = layout.row_stride;
  rows.row_dims = static_cast<int8_t>(layout.dims);
  rows.inner_dims = static_cast<int8_t>(layout.inner_dims);
  std::copy(layout.sizes, layout.sizes + layout.dims, rows.sizes[0]);
  std::copy(layout.strides, layout.strides + layout.dims, rows.strides[0]);
  std::copy(layout.inner_sizes, layout.inner_sizes + layout.inner_dims, rows.sizes[1]);
  std::copy(layout.inner_strides, layout.inner_strides + layout.inner_dims, rows.strides[1]);
}

// One table. Its streams: parameter, states.
template <typename Rule, typename Rows>
struct RowsWork {
  RuleSlot<Rule> rule;
  TableEntries table;
  Stream streams[1 + Rule::kStates];
  Rows rows[1 + Rule::kStates];
  uint64_t first_row;
  int tile;   // entries of a block, at most kThreads
  int lanes;  // of a row: a power of two, at most a warp
};

// The rows that begin in a block's tile of the entries.
struct RowsOfTile {
  int begins[kThreads + 1];  // from the start of the tile; one more: the last row's end
  int in_warp[kThreads / kWarp];
};

template <typename T, typename Rule, typename Access, int kWidth, typename Rows>
struct RowsUpdate {
  using Item = RowsWork<Rule, Rows>;
  static constexpr bool kNative = !std::is_same_v<Access, Any>;
  static constexpr int kInFlight = kNative ? 8 : 4;  // entries of a row that are read at a time
  static constexpr int kSharedBytes = sizeof(RowsOfTile);
  static constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : kNative && kWidth > 1 ? 4 : 3;

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
    RowsOfTile& rows = shared_memory<RowsOfTile>();
    const Entries tile = t.sorted(all).from(begin);
    const int count = find_rows(item, tile, begin, rows);

    const int column =
        column_tile * kColumnTile + static_cast<int>(threadIdx.x) % item.lanes * kWidth;
    const int end = column_end(column_tile, t.dim);
    for (int k = static_cast<int>(threadIdx.x) / item.lanes; k < count;
         k += kThreads / item.lanes) {
      const int first = rows.begins[k], length = rows.begins[k + 1] - first;
      const uint64_t row = tile.row(first);
      if (row == t.dropped_row) continue;
      for (int c = column; c < end; c += item.lanes * kWidth)
        update(item, tile.from(first), begin + first, length,
               static_cast<int64_t>(row - item.first_row), c);
    }
  }

 private:
  // Lists the rows that begin in the tile; returns how many. The last one may go on after the tile:
  // the block looks kPiece entries ahead, so its length is right up to kPiece and beyond that only
  // known to be greater, which says that it is a long run.
  __device__ static int find_rows(const Item& item, const Entries& sorted, int64_t begin,
                                  RowsOfTile& rows) {
    static_assert(kThreads == kPiece);
    const int64_t left = item.table.entries - begin;
    const int tile = static_cast<int>(left < item.tile ? left : item.tile);
    const int thread = static_cast<int>(threadIdx.x);
    bool begins = false;
    if (thread < tile) begins = begin + thread == 0 || sorted.row(thread - 1) != sorted.row(thread);
    const unsigned ballot = __ballot_sync(kFullWarp, begins);
    if (thread % kWarp == 0) rows.in_warp[thread / kWarp] = __popc(ballot);
    const bool goes_on = tile + thread < left && sorted.row(tile + thread) == sorted.row(tile - 1);
    const int beyond = __syncthreads_count(goes_on);  // rows are sorted: the first so many

    int before = __popc(ballot & ((1u << thread % kWarp) - 1)), count = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < thread / kWarp) before += rows.in_warp[w];
      count += rows.in_warp[w];
    }
    if (begins) rows.begins[before] = thread;
    if (thread == 0) rows.begins[count] = tile + beyond;
    __syncthreads();
    return count;
  }

  // Columns [c, c + kWidth) of the row whose entries are the first `length` of `run`.
  __device__ static void update(const Item& item, const Entries& run, int64_t first, int length,
                                int64_t row, int c) {
    const TableEntries& t = item.table;
    T grad[kWidth], param[kWidth], states[Rule::kStates][kWidth];
    int i = 1;
    if (length > kPiece) {
      const T* const sum = static_cast<const T*>(t.sums) + (2 * (first / kPiece) + 1) * t.dim + c;
      load_packed(sum, true, grad);
      i = length;
    } else {
      load_value(t, run, 0, c, grad);
      for (; i + kInFlight <= length; i += kInFlight) add_values<kInFlight>(t, run, i, c, grad);
      for (; i + kInFlight / 2 <= length; i += kInFlight / 2)
        add_values<kInFlight / 2>(t, run, i, c, grad);
    }
    // Only here, so that many entries can be in flight above; few entries are so together with
    // these.
    load_vector<Access>(item.streams[0], item.rows[0].offset(row, c), true, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k)
      load_vector<Access>(item.streams[1 + k], item.rows[1 + k].offset(row, c), true, states[k]);
    for (; i + 2 <= length; i += 2) add_values<2>(t, run, i, c, grad);
    if (i < length) add_values<1>(t, run, i, c, grad);
    apply_rule(item.rule.get(), grad, param, states);
    store_vector<Access>(item.streams[0], item.rows[0].offset(row, c), true, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k)
      store_vector<Access>(item.streams[1 + k], item.rows[1 + k].offset(row, c), true, states[k]);
  }

  __device__ static void load_value(const TableEntries& t, const Entries& run, int i, int c,
                                    T (&out)[kWidth]) {
    load_vector<Access>(t.values, run.entry(i) * t.value_stride + c, true, out);
  }

  // Entries [i, i + kCount) of the run, in order.
  template <int kCount>
  __device__ static void add_values(const TableEntries& t, const Entries& run, int i, int c,
                                    T (&sum)[kWidth]) {
    T x[kCount][kWidth];
#pragma unroll
    for (int k = 0; k < kCount; ++k) load_value(t, run, i + k, c, x[k]);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int w = 0; w < kWidth; ++w) sum[w] += x[k][w];
  }
};

// ----------------------------------------------------------------------------------------- host

bool is_strided(const RowLayout& layout) { return layout.dims == 0 && layout.inner_dims == 0; }

// Whether the rows of a stream can be read in vectors of `width` elements.
bool is_aligned(const Stream& s, int64_t row_stride, int64_t dim, int width) {
  return dim % width == 0 && row_stride % width == 0 &&
         reinterpret_cast<uintptr_t>(s.data) % (storage_size(s.storage) * width) == 0;
}

// Entries of a block: enough blocks to fill the device, then up to kTileElements each.
int tile_entries(int64_t entries, int dim, int lanes) {
  const int64_t columns = std::min(dim, kColumnTile), tiles = column_tiles(dim);
  int tile = kThreads / lanes;
  while (tile < kThreads && 2 * tile * columns <= kTileElements &&
         entries * tiles > kTargetBlocks * tile)
    tile *= 2;
  return tile;
}

TableEntries table_entries(const RowsItem& item, void* sums) {
  return {item.values,
          item.value_stride,
          item.entries,
          item.first_entry,
          static_cast<uint64_t>(item.first_row + item.rows),
          sums,
          static_cast<int>(item.dim)};
}

// The works of one rule and arithmetic type, by the kernel that fits.
template <typename T, typename Rule>
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
    w.rule = {Rule(*item.rule.params), static_cast<const Rule*>(resolved)};
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
                       RowsUpdate<T, Rule, Access, kWidth, Rows>{{sorted.keys, sorted.entry_bits},
                                                                 context.found_inf},
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
    sums_.push_back(item.entries > kPiece && item.dim > 0
                        ? context.allocate(2 * slots(item.entries) * item.dim * size)
                        : nullptr);
  }
}

void RowsRoadCuda::run(const RulesOnDevice& rules) const {
  if (!items_) return;
  sum_long_runs<float>(*items_, sums_, sorted_, context_->stream);
  sum_long_runs<double>(*items_, sums_, sorted_, context_->stream);
  for_each_rule([&]<typename T, typename Rule>() {
    Works<T, Rule> works;
    for (size_t i = 0; i < items_->size(); ++i) {
      const RowsItem& item = (*items_)[i];
      if (item.dim > 0 && is_updated_by<T, Rule>(item.rule, item.param))
        works.add(item, sums_[i], rules.rows(i));
    }
    works.launch(sorted_, *context_);
  });
}

}  // namespace tiger_ext
