// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of lazy modes have in common: the history in device memory (group_history.h),
// and what a row that is behind it has missed.
#pragma once

#include "cuda/multi_tensor.cuh"
#include "rules/history.h"
#include "step/items.h"

namespace tiger_ext {

// The clocks of one table's rows, or null pointers if it has none.
struct LazyTable {
  int32_t* last_step;
  const HistoryClock* clock;
  bool drifts;  // lazy="exact"
  bool moves;

  LazyTable() = default;
  explicit LazyTable(const RuleUse& use)
      : last_step(use.last_step),
        clock(use.params->clock),
        drifts(use.params->lazy == Lazy::kExact),
        moves(use.params->moves) {}

  // The step up to which rows are brought before their update, and that of their update.
  __device__ int32_t current() const { return clock->steps; }
  __device__ int32_t updated() const { return clock->steps + (moves ? 1 : 0); }
  // The clock of a row that is brought up to date but not touched.
  __device__ int32_t brought(int32_t last) const { return last < 0 ? -1 - current() : current(); }
};

// What one row has missed.
template <typename T>
struct RowGap {
  CatchUp<T> catch_up;
  bool behind;

  // `last` is the row's clock; the streams are those of the states.
  template <int kStates>
  __device__ void look_up(const LazyTable& table, int32_t last, const Stream* states) {
    T floors[kStates];
    for (int k = 0; k < kStates; ++k) floors[k] = smallest_kept<T>(states[k].storage);
    look_up_with<kStates>(table, last, floors);
  }

  // With what no state falls below.
  template <int kStates>
  __device__ void look_up_with(const LazyTable& table, int32_t last, const T* floors) {
    const int32_t from = current_up_to(last), to = table.current();
    behind = from < to;
    if (!behind) return;
    const SkippedSteps skipped =
        skipped_steps(table.clock->stretches, table.clock->count, from, to);
    catch_up = catch_up_with<T, kStates>(missed(skipped, kStates == 2), floors);
  }

  // Brings elements of the row, in registers, up to date.
  template <int kStates, int kWidth>
  __device__ void apply(const LazyTable& table, T (&param)[kWidth],
                        T (&states)[kStates][kWidth]) const {
    const CatchUp<T> c = catch_up;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      if (table.drifts) c.template param<true>(param[w], states[0][w]);
      else c.template param<false>(param[w], states[0][w]);
      c.template state<0>(states[0][w]);
      if constexpr (kStates == 2) c.template state<1>(states[1][w]);
    }
  }
};

}  // namespace tiger_ext
