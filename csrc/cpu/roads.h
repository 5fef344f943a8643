// SPDX-License-Identifier: Apache-2.0
//
// The three roads of a CPU step. `prepare` allocates all that `run` needs and, where a gradient
// must be finite, returns the first item whose is not, else -1; `run` writes and cannot fail. The
// items must stay where they are in between.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/long_runs.h"
#include "cpu/scratch.h"

namespace tiger_ext {

// Updates every element of parameters with strided gradients. Items whose rule looks at the whole
// tensor first get a rule of their own; one that is to be skipped loses its elements and counters.
class DenseRoad {
 public:
  int64_t prepare(std::vector<DenseItem>& items);
  void run();

 private:
  struct Look {
    DenseItem* item;
    RuleParams rule;     // the item's, once the facts are known
    size_t first_chunk;  // of `facts_`
  };

  void look(const Look& look);
  void decide(Look& look) const;

  std::vector<DenseItem>* items_ = nullptr;
  std::deque<Look> looks_;
  std::vector<Facts> facts_;     // of each chunk of the items that are looked at
  std::vector<int64_t> starts_;  // of each item, in the range of all elements
  int64_t elements_ = 0;
};

// Updates the touched rows of parameters with strided gradients, looking at every row.
class DirectRoad {
 public:
  int64_t prepare(const std::vector<RowsItem>& items);
  void run() const;

 private:
  template <typename F>
  void for_each_part(const F& f) const;

  const std::vector<RowsItem>* items_ = nullptr;
  std::vector<int64_t> starts_;  // the first task of each item
  int64_t task_count_ = 0;
};

// Updates every touched row of parameters with sparse gradients. Besides the plan's keys it needs
// the sums of cpu/long_runs.h.
class RowsRoad {
 public:
  int64_t prepare(const std::vector<RowsItem>& items, const SortedEntries& sorted,
                  Scratch& scratch);
  void run();

 private:
  struct Tasks {
    int64_t first;    // of this item, counted over all items
    int64_t entries;  // of each of its tasks
  };

  template <typename F>
  void for_each_part(const F& f) const;
  int64_t first_nonfinite();

  const std::vector<RowsItem>* items_ = nullptr;
  SortedEntries sorted_;
  bool serial_ = true;
  LongRunSums long_runs_;
  std::vector<Tasks> tasks_;
  int64_t task_count_ = 0;
};

}  // namespace tiger_ext
