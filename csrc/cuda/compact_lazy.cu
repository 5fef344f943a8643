// SPDX-License-Identifier: Apache-2.0
//
// Rows that are brought up to date without a gradient, of tables with compact state. One group of
// lanes has the whole row, however long it is.
#include "cuda/compact.cuh"
#include "cuda/lazy.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/rules.cuh"

namespace tiger_ext {
namespace {

// Some rows of one table. Its streams: parameter, states.
template <typename T, int kStates, typename Rows>
struct CompactCatchUpWork {
  LazyTable lazy;
  CompactState<T> compact;
  Stream streams[1 + kStates];
  Rows rows[1 + kStates];
  const int64_t* ids;  // or null: the rows from `begin` on
  int64_t begin, count;
  int64_t limit;  // of the table's rows
  int64_t dim;
  int tile;   // rows of a block, at most kThreads
  int lanes;  // of a row: a power of two, at most a warp
};

// With ids a row may be named several times: who sets its clock has it. Without them the clocks are
// set afterwards (lazy.cu).
template <typename T, int kStates, bool kRowMoment, int kWidth, typename Rows>
struct CompactCatchUp {
  using Item = CompactCatchUpWork<T, kStates, Rows>;
  static constexpr int kSharedBytes = kThreads * sizeof(RowGap<T>), kMinBlocks = 2;

  const float* found_inf;

  int64_t blocks(const Item& item) const { return (item.count + item.tile - 1) / item.tile; }

  __device__ void operator()(const Item& item, uint32_t block) const {
    if (step_cancelled(found_inf)) return;
    const int64_t begin = static_cast<int64_t>(block) * item.tile;
    const int64_t left = item.count - begin;
    const int count = static_cast<int>(left < item.tile ? left : item.tile);
    RowGap<T>* const gaps = &shared_memory<RowGap<T>>();
    const int thread = static_cast<int>(threadIdx.x);
    bool behind = false;
    if (thread < count) {
      RowGap<T>& gap = gaps[thread];
      gap.behind = false;
      const int64_t row = row_at(item, begin + thread);
      if (row >= 0 && row < item.limit) look_at(item, row, gap);
      behind = gap.behind;
    }
    if (!__syncthreads_or(behind)) return;
    const UnitLanes lanes(item.lanes);
    for (int k = thread / item.lanes; k < count; k += kThreads / item.lanes)
      if (gaps[k].behind)
        catch_up_row<T, kStates, kRowMoment, kWidth>(item.lazy, item.compact, item.streams,
                                                     item.rows, row_at(item, begin + k), item.dim,
                                                     lanes, gaps[k].catch_up);
  }

 private:
  __device__ static int64_t row_at(const Item& item, int64_t i) {
    return item.ids ? item.ids[item.begin + i] : item.begin + i;
  }

  __device__ static void look_at(const Item& item, int64_t row, RowGap<T>& gap) {
    int32_t* const clock = item.lazy.last_step + row;
    const int32_t last = *clock;
    if (current_up_to(last) >= item.lazy.current()) return;
    if (item.ids && atomicCAS(clock, last, item.lazy.brought(last)) != last) return;
    look_up_gap<T, kStates, kRowMoment>(item.lazy, last, item.streams + 1, gap);
  }
};

// The works of one arithmetic type and kind of state, by the kernel that fits.
template <typename T, int kStates, bool kRowMoment>
class Works {
 public:
  void add(const RowsToCatchUp& rows) {
    const RowsItem& item = *rows.item;
    bool wide = kWide > 1;
    const auto look = [&](const Stream& s, const RowLayout& layout) {
      wide = wide && is_strided(layout) && is_aligned(s, layout.row_stride, item.dim, kWide);
    };
    look(item.param, item.param_layout);
    for (int k = 0; k < kStates; ++k) look(item.states[k], item.state_layouts[k]);
    if (wide) wide_.push_back(work<StridedRows>(rows, kWide));
    else any_.push_back(work<AnyRows>(rows, 1));
  }

  void launch(const DeviceContext& c) const {
    if constexpr (kWide > 1)
      multi_tensor_apply(
          wide_, CompactCatchUp<T, kStates, kRowMoment, kWide, StridedRows>{c.found_inf}, c.stream);
    multi_tensor_apply(any_, CompactCatchUp<T, kStates, kRowMoment, 1, AnyRows>{c.found_inf},
                       c.stream);
  }

 private:
  static constexpr int kWide = sizeof(T) == 4 ? 8 : 1;

  template <typename Rows>
  static CompactCatchUpWork<T, kStates, Rows> work(const RowsToCatchUp& rows, int width) {
    const RowsItem& item = *rows.item;
    CompactCatchUpWork<T, kStates, Rows> w{};
    w.lazy = LazyTable(item.rule);
    w.compact = {item.rule.rounding, item.scales, item.block_scales, item.row_moment};
    w.streams[0] = item.param;
    set_layout(w.rows[0], item.param_layout);
    for (int k = 0; k < kStates; ++k) {
      w.streams[1 + k] = item.states[k];
      set_layout(w.rows[1 + k], item.state_layouts[k]);
    }
    w.ids = rows.ids;
    w.begin = rows.begin;
    w.count = rows.end - rows.begin;
    w.limit = item.rows;
    w.dim = item.dim;
    w.lanes = lanes_of_unit(item.dim, width, 1);
    w.tile =
        tile_entries(w.count, static_cast<int>(std::min<int64_t>(item.dim, kColumnTile)), w.lanes);
    return w;
  }

  std::vector<CompactCatchUpWork<T, kStates, StridedRows>> wide_;
  std::vector<CompactCatchUpWork<T, kStates, AnyRows>> any_;
};

template <typename T, int kStates, bool kRowMoment>
void run(const std::vector<RowsToCatchUp>& work, const DeviceContext& context) {
  Works<T, kStates, kRowMoment> works;
  for (const RowsToCatchUp& rows : work) {
    const RowsItem& item = *rows.item;
    int states = 0;
    while (states < kMaxStates && item.states[states].data) ++states;
    if (item.dim > 0 && is_compact(item) && states == kStates &&
        (item.row_moment != nullptr) == kRowMoment &&
        (item.param.storage == Storage::kFloat64) == (sizeof(T) == sizeof(double)))
      works.add(rows);
  }
  works.launch(context);
}

template <typename T>
void run_all(const std::vector<RowsToCatchUp>& work, const DeviceContext& context) {
  run<T, 1, false>(work, context);
  run<T, 2, false>(work, context);
  run<T, 0, true>(work, context);
  run<T, 1, true>(work, context);
}

}  // namespace

void catch_up_compact_rows(const std::vector<RowsToCatchUp>& work, const DeviceContext& context) {
  run_all<float>(work, context);
  run_all<double>(work, context);
}

}  // namespace tiger_ext
