// SPDX-License-Identifier: Apache-2.0
#include "cuda/lazy.h"

#include "cuda/faults.cuh"
#include "cuda/lazy_rows.cuh"
#include "cuda/row_tables.cuh"
#include "cuda/rules.cuh"
#include "cuda/vectors.cuh"

namespace tiger_ext {
namespace {

// ------------------------------------------------------------------------------------- histories

struct Advance {
  using Item = HistoryAdvance;
  static constexpr int kSharedBytes = 0, kMinBlocks = 1;

  const float* found_inf;
  FaultSlot* report;

  int64_t blocks(const Item&) const { return 1; }

  __device__ void operator()(const Item& item, uint32_t) const {
    if (threadIdx.x != 0) return;
    const bool happens = !step_cancelled(found_inf);
    if (item.counter && happens) ++*item.counter;
    if (!item.clock) return;
    HistoryClock& clock = *item.clock;
    if (happens) count_step(item, clock);
    // A replay comes with the number of the call that was captured.
    if (static_cast<int32_t>(item.sequence - clock.sequence) > 0) clock.sequence = item.sequence;
    *static_cast<volatile uint64_t*>(item.note) =
        static_cast<uint64_t>(clock.sequence) << 32 | static_cast<uint32_t>(clock.count);
  }

 private:
  __device__ void count_step(const Item& item, HistoryClock& clock) const {
    ++clock.steps;
    const double lr = item.lr_there ? *item.lr_there : item.lr;
    const bool same = clock.count > 0 && clock.stretches[clock.count - 1].same(
                                             lr, item.weight_decay, item.beta1, item.beta2);
    if (!(lr * item.weight_decay < 1.0)) {
      tell(item, FaultKind::kRateTooLarge);
    } else if (!same && clock.count == clock.capacity) {
      ++clock.lost;
      tell(item, FaultKind::kHistoryFull);
    } else if (!same) {
      clock.count = static_cast<int32_t>(append_step(clock.stretches, clock.count, clock.steps, lr,
                                                     item.weight_decay, item.beta1, item.beta2));
    }
  }

  __device__ void tell(const Item& item, FaultKind kind) const {
    report_fault(report, kind, {{item.place.group, 0}, 0, 0, 0, item.clock->capacity}, 1);
  }
};

struct WriteHistory {
  struct Item {
    HistoryClock* clock;
    Stretch* stretches;
    int32_t capacity;
    const double* settings;
    int32_t count, steps;
  };
  static constexpr int kSharedBytes = 0, kMinBlocks = 1;

  int64_t blocks(const Item&) const { return 1; }

  // One after the other: each stretch has the sums over those before it. The sums are the device's,
  // so that a history that was read and written again has the same bits.
  __device__ void operator()(const Item& item, uint32_t) const {
    if (threadIdx.x != 0) return;
    int64_t count = 0;
    for (int32_t k = 0; k < item.count; ++k) {
      const double* const s = item.settings + 5 * static_cast<int64_t>(k);
      count =
          append_step(item.stretches, count, static_cast<int64_t>(s[0]), s[1], s[2], s[3], s[4]);
    }
    *item.clock = {item.stretches, item.steps, static_cast<int32_t>(count), item.capacity, 0, 0};
  }
};

// To other memory, or, if that is null, to the beginning.
struct ResetHistory {
  struct Item {
    HistoryClock* clock;
    Stretch* stretches;
    int32_t capacity;
  };
  static constexpr int kSharedBytes = 0, kMinBlocks = 1;

  int64_t blocks(const Item&) const { return 1; }

  __device__ void operator()(const Item& item, uint32_t) const {
    if (threadIdx.x != 0) return;
    if (item.stretches) {
      item.clock->stretches = item.stretches;
      item.clock->capacity = item.capacity;
    } else {
      item.clock->count = item.clock->lost = 0;
    }
  }
};

// ------------------------------------------------------------------------------------------ rows

// Some rows of one table. Its streams: parameter, states.
template <typename T, int kStates, typename Rows>
struct CatchUpWork {
  LazyTable lazy;
  Stream streams[1 + kStates];
  Rows rows[1 + kStates];
  const int64_t* ids;  // or null: the rows from `begin` on
  int64_t begin, count;
  int64_t limit;  // of the table's rows
  int64_t dim;
  int tile;   // rows of a block, at most kThreads
  int lanes;  // of a row: a power of two, at most a warp
};

// With ids a row may be named several times: who sets its clock has it, all columns of it. Without
// them a block has up to kColumnTile columns, and the clocks are set afterwards (StampClocks).
template <typename T, int kStates, int kWidth, typename Rows, bool kIds>
struct CatchUpRows {
  using Item = CatchUpWork<T, kStates, Rows>;
  static constexpr int kSharedBytes = kThreads * sizeof(RowGap<T>), kMinBlocks = 2;

  const float* found_inf;

  __host__ __device__ static int64_t column_blocks(const Item& item) {
    return kIds ? 1 : (item.dim + kColumnTile - 1) / kColumnTile;
  }
  int64_t blocks(const Item& item) const {
    return (item.count + item.tile - 1) / item.tile * column_blocks(item);
  }

  __device__ void operator()(const Item& item, uint32_t block) const {
    if (step_cancelled(found_inf)) return;
    const int64_t columns = column_blocks(item);
    const int64_t begin = static_cast<int64_t>(block) / columns * item.tile;
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

    const int64_t column = static_cast<int64_t>(block) % columns * kColumnTile;
    const int64_t end = kIds || item.dim - column < kColumnTile ? item.dim : column + kColumnTile;
    for (int k = thread / item.lanes; k < count; k += kThreads / item.lanes) {
      if (!gaps[k].behind) continue;
      const int64_t row = row_at(item, begin + k);
      for (int64_t c = column + thread % item.lanes * kWidth; c < end; c += item.lanes * kWidth)
        update(item, gaps[k], row, c);
    }
  }

 private:
  __device__ static int64_t row_at(const Item& item, int64_t i) {
    return item.ids ? item.ids[item.begin + i] : item.begin + i;
  }

  __device__ static void look_at(const Item& item, int64_t row, RowGap<T>& gap) {
    int32_t* const clock = item.lazy.last_step + row;
    const int32_t last = *clock;
    if (current_up_to(last) >= item.lazy.current()) return;
    if (kIds && atomicCAS(clock, last, item.lazy.brought(last)) != last) return;
    gap.template look_up<kStates>(item.lazy, last, item.streams + 1);
  }

  __device__ static void update(const Item& item, const RowGap<T>& gap, int64_t row, int64_t c) {
    T param[kWidth], states[kStates][kWidth];
    load_vector<Any>(item.streams[0], item.rows[0].offset(row, c), true, param);
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      load_vector<Any>(item.streams[1 + k], item.rows[1 + k].offset(row, c), true, states[k]);
    gap.apply(item.lazy, param, states);
    store_vector<Any>(item.streams[0], item.rows[0].offset(row, c), true, param);
#pragma unroll
    for (int k = 0; k < kStates; ++k)
      store_vector<Any>(item.streams[1 + k], item.rows[1 + k].offset(row, c), true, states[k]);
  }
};

// Sets clocks: of rows that were brought up to date, or of a whole tensor that was updated.
struct StampClocks {
  struct Item {
    LazyTable lazy;
    int64_t begin, count;
    const Verdict* verdict;  // of an update; null: kUpdate
    bool update;
  };
  static constexpr int kSharedBytes = 0, kMinBlocks = 4;
  static constexpr int64_t kPerBlock = 8 * kThreads;

  const float* found_inf;

  int64_t blocks(const Item& item) const { return (item.count + kPerBlock - 1) / kPerBlock; }

  __device__ void operator()(const Item& item, uint32_t block) const {
    if (step_cancelled(found_inf)) return;
    if (item.verdict && *item.verdict != Verdict::kUpdate) return;
    const int64_t first = block * kPerBlock;
    const int64_t end = item.count - first < kPerBlock ? item.count : first + kPerBlock;
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
      int32_t& last = item.lazy.last_step[item.begin + i];
      if (item.update) last = item.lazy.updated();
      else if (current_up_to(last) < item.lazy.current()) last = item.lazy.brought(last);
    }
  }
};

// The works of one arithmetic type and number of states, by the kernel that fits.
template <typename T, int kStates, bool kIds>
class CatchUpWorks {
 public:
  void add(const RowsToCatchUp& rows) {
    const RowsItem& item = *rows.item;
    bool wide = true;
    const auto look = [&](const Stream& s, const RowLayout& layout) {
      wide = wide && is_strided(layout) && is_aligned(s, layout.row_stride, item.dim, kWide);
    };
    look(item.param, item.param_layout);
    for (int k = 0; k < kStates; ++k) look(item.states[k], item.state_layouts[k]);
    if (wide) wide_.push_back(work<StridedRows>(rows, kWide));
    else any_.push_back(work<AnyRows>(rows, 1));
  }

  void launch(const DeviceContext& c) const {
    multi_tensor_apply(wide_, CatchUpRows<T, kStates, kWide, StridedRows, kIds>{c.found_inf},
                       c.stream);
    multi_tensor_apply(any_, CatchUpRows<T, kStates, 1, AnyRows, kIds>{c.found_inf}, c.stream);
  }

 private:
  static constexpr int kWide = 16 / sizeof(T);

  template <typename Rows>
  static CatchUpWork<T, kStates, Rows> work(const RowsToCatchUp& rows, int width) {
    const RowsItem& item = *rows.item;
    CatchUpWork<T, kStates, Rows> w{};
    w.lazy = LazyTable(item.rule);
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
    w.lanes = 1;
    while (w.lanes < kWarp && w.lanes * width < item.dim) w.lanes *= 2;
    w.tile =
        tile_entries(w.count, static_cast<int>(std::min<int64_t>(item.dim, kColumnTile)), w.lanes);
    return w;
  }

  std::vector<CatchUpWork<T, kStates, StridedRows>> wide_;
  std::vector<CatchUpWork<T, kStates, AnyRows>> any_;
};

template <typename T, int kStates>
void run(const std::vector<RowsToCatchUp>& work, const DeviceContext& context) {
  CatchUpWorks<T, kStates, true> named;
  CatchUpWorks<T, kStates, false> ranges;
  for (const RowsToCatchUp& rows : work) {
    const RowsItem& item = *rows.item;
    if (item.dim == 0 || is_compact(item) || (item.states[1].data ? 2 : 1) != kStates ||
        (item.param.storage == Storage::kFloat64) != (sizeof(T) == sizeof(double)))
      continue;
    if (rows.ids) named.add(rows);
    else ranges.add(rows);
  }
  named.launch(context);
  ranges.launch(context);
}

}  // namespace

void advance_histories(const std::vector<HistoryAdvance>& work, const DeviceContext& context) {
  multi_tensor_apply(work, Advance{context.found_inf, context.faults}, context.stream);
}

void write_history(HistoryClock* clock, Stretch* stretches, int32_t capacity,
                   const double* settings, int32_t count, int32_t steps, cudaStream_t stream) {
  multi_tensor_apply({{clock, stretches, capacity, settings, count, steps}}, WriteHistory{},
                     stream);
}

void move_history(HistoryClock* clock, Stretch* stretches, int32_t capacity, cudaStream_t stream) {
  multi_tensor_apply({{clock, stretches, capacity}}, ResetHistory{}, stream);
}

void clear_history(HistoryClock* clock, cudaStream_t stream) {
  multi_tensor_apply({{clock, nullptr, 0}}, ResetHistory{}, stream);
}

void catch_up_rows(const std::vector<RowsToCatchUp>& work, const DeviceContext& context) {
  run<float, 1>(work, context);
  run<float, 2>(work, context);
  run<double, 1>(work, context);
  run<double, 2>(work, context);
  catch_up_compact_rows(work, context);
  std::vector<StampClocks::Item> clocks;
  for (const RowsToCatchUp& rows : work)
    if (!rows.ids)
      clocks.push_back(
          {LazyTable(rows.item->rule), rows.begin, rows.end - rows.begin, nullptr, false});
  multi_tensor_apply(clocks, StampClocks{context.found_inf}, context.stream);
}

void stamp_dense(const std::vector<DenseItem>& items, const RulesOnDevice& rules,
                 const DeviceContext& context) {
  std::vector<StampClocks::Item> clocks;
  for (size_t i = 0; i < items.size(); ++i)
    if (items[i].rule.last_step)
      clocks.push_back({LazyTable(items[i].rule), 0, items[i].rule.last_steps,
                        static_cast<const Verdict*>(rules.dense(i)), true});
  multi_tensor_apply(clocks, StampClocks{context.found_inf}, context.stream);
}

}  // namespace tiger_ext
