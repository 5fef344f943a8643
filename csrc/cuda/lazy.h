// SPDX-License-Identifier: Apache-2.0
//
// The lazy modes on CUDA, beside the roads: histories in device memory, and rows that are brought
// up to date without a gradient. No torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "cuda/roads.h"
#include "rules/history.h"
#include "step/items.h"

namespace tiger_ext {

// One more step of a history, or of a counter of AdamW, in device memory.
struct HistoryAdvance {
  HistoryClock* clock;  // or null
  double lr;
  const double* lr_there;  // or null: in device memory, in the place of lr
  double weight_decay, beta1, beta2;
  uint32_t sequence;  // the number of this call, and
  uint64_t* note;     // where the host can see it: sequence << 32 | the count of stretches
  int64_t* counter;   // or null
  UpdatePlace place;
};

// Unless found_inf cancels the step. One whose hyperparameters a history has no room for, or that
// are not legal, counts with those before it (the first: without any effect), and is reported.
void advance_histories(const std::vector<HistoryAdvance>& work, const DeviceContext& context);

// Writes a history of `count` settings, five doubles each in device memory: the first step, lr,
// weight_decay, first and last beta.
void write_history(HistoryClock* clock, Stretch* stretches, int32_t capacity,
                   const double* settings, int32_t count, int32_t steps, cudaStream_t stream);

// Lets a history go on in larger memory, to which its stretches have been copied.
void move_history(HistoryClock* clock, Stretch* stretches, int32_t capacity, cudaStream_t stream);

// Drops the stretches.
void clear_history(HistoryClock* clock, cudaStream_t stream);

// Brings rows of tables (items of ItemBuilder::add_table) up to date: rows [begin, end), or those
// of ids[begin, end), any number of times each; ids that are no row are dropped.
struct RowsToCatchUp {
  const RowsItem* item;
  const int64_t* ids;
  int64_t begin, end;
};
void catch_up_rows(const std::vector<RowsToCatchUp>& work, const DeviceContext& context);

// Those of tables with compact state; not their clocks.
void catch_up_compact_rows(const std::vector<RowsToCatchUp>& work, const DeviceContext& context);

// After the dense road: the clocks of tensors with strided gradients, as far as their verdicts let
// them be updated.
void stamp_dense(const std::vector<DenseItem>& items, const RulesOnDevice& rules,
                 const DeviceContext& context);

}  // namespace tiger_ext
