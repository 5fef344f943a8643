// SPDX-License-Identifier: Apache-2.0
//
// The two roads of a CUDA step. Like those of the CPU: `prepare` allocates, `run` launches and
// needs nothing more. Nothing here waits for the device. No torch; memory comes from a callback.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "rules/rule_list.h"
#include "step/faults.h"
#include "step/items.h"

namespace tiger_ext {

// Of a table: sparse dimensions, and dimensions that do not follow one another in memory.
constexpr int kMaxSeparateDims = 8;

constexpr int kColumnTile = 1024;  // columns of a block's work

// What the roads of one device need from outside.
struct DeviceContext {
  cudaStream_t stream = nullptr;
  const float* grad_scale = nullptr;  // in device memory, or null
  const float* found_inf = nullptr;
  FaultSlot* faults = nullptr;  // in memory that host and device see
  // Device memory that lives until the step's kernels have run, aligned to 256 bytes.
  std::function<void*(int64_t bytes)> allocate;
};

// The rules' constants, where the host cannot compute them; for dense items also the verdict on
// their gradients and their relative learning rates.
class RulesOnDevice {
 public:
  void prepare(const std::vector<DenseItem>& dense, const std::vector<RowsItem>& rows,
               const std::vector<RowsItem>& direct, const std::vector<RuleUse>& idle,
               const DeviceContext& context);
  // Advances the counters and computes the constants, unless found_inf cancels the step.
  void run() const;
  // The ResolvedRule of item i in device memory, or null: the host's constants hold.
  const void* dense(size_t i) const { return slot(dense_[i]); }
  const void* rows(size_t i) const { return slot(rows_[i]); }
  const void* direct(size_t i) const { return slot(direct_[i]); }

 private:
  struct Job {
    RuleUse use;
    bool is_double;
    bool alone;              // not shared by several items
    const DenseItem* dense;  // or null
    Facts* facts;            // of its chunks, or null
  };
  int add(const RuleUse& use, bool is_double, const DenseItem* dense);
  const void* slot(int job) const;

  const DeviceContext* context_ = nullptr;
  std::vector<Job> jobs_;
  std::vector<int> dense_, rows_, direct_;  // the job of each item, or -1
  char* memory_ = nullptr;
};

// For nonfinite="raise": lowers *bad to the index of the first item whose gradient has a NaN or
// Inf.
void find_nonfinite(const std::vector<DenseItem>& items, int32_t* bad,
                    const DeviceContext& context);

// Updates every element of parameters with strided gradients.
class DenseRoadCuda {
 public:
  void prepare(const std::vector<DenseItem>& items, const DeviceContext& context);
  void run(const RulesOnDevice& rules) const;

 private:
  const std::vector<DenseItem>* items_ = nullptr;
  const DeviceContext* context_ = nullptr;
};

// The entries of all tables, sorted by (table, row, entry): key = global row << entry_bits | entry
// of its table.
struct SortedEntriesCuda {
  const uint64_t* keys = nullptr;
  int entry_bits = 0;
};

// Checks and sorts; launches at once, because it writes nothing but scratch memory. Entries with a
// bad index get the row after their table's last one and are reported.
// Scratch: 16 bytes an entry, what CUB asks for (little more), 16 bytes a table.
SortedEntriesCuda plan_rows_cuda(const std::vector<RowsItem>& items,
                                 const std::vector<RowIndices>& indices,
                                 const std::vector<UpdatePlace>& places,
                                 const DeviceContext& context);

// Updates every touched row. Scratch: for tables with more than 256 entries, 1/128 of what the
// entries' values take in the arithmetic type.
class RowsRoadCuda {
 public:
  void prepare(const std::vector<RowsItem>& items, const SortedEntriesCuda& sorted,
               const DeviceContext& context);
  void run(const RulesOnDevice& rules) const;
  // As above; item i counts as index first + i.
  void find_nonfinite(int32_t* bad, int32_t first) const;

 private:
  const std::vector<RowsItem>* items_ = nullptr;
  const DeviceContext* context_ = nullptr;
  SortedEntriesCuda sorted_;
  std::vector<void*> sums_;  // of each item: the sums of its long runs' pieces, or null
};

// Rows that are looked at before they are updated, or that belong to an accumulation window, or
// long ones in a lazy mode: the rows of sorted entries, and those of direct items. `sums` and
// `sorted` are of the former.
struct CarefulRows {
  const RowsItem* item;
  const void* sums;
  const void* resolved;
  int32_t place;
};
void update_careful_rows(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                         const DeviceContext& context);
void find_nonfinite(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                    int32_t* bad, const DeviceContext& context);

// Whether its state is compact, or it is rounded stochastically: cuda/compact.cu has it.
inline bool is_compact(const RowsItem& item) {
  return item.scales || item.row_moment || item.rule.rounding.param;
}
void update_compact_rows(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                         const DeviceContext& context);
void find_nonfinite_compact(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                            int32_t* bad, const DeviceContext& context);
// Of the dense road, the tensors that go by blocks.
void update_compact_blocks(const std::vector<DenseItem>& items, const RulesOnDevice& rules,
                           const DeviceContext& context);

inline bool needs_care(const RowsItem& item) {
  const RuleParams& rule = *item.rule.params;
  return item.direct || is_compact(item) || rule_info(rule.kind).directed || rule.looks() ||
         item.rule.window || (item.rule.last_step && item.dim > kColumnTile);
}

}  // namespace tiger_ext
