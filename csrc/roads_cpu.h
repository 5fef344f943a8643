// SPDX-License-Identifier: Apache-2.0
//
// The three roads of a CPU step. `prepare` allocates all that `run` needs and, where a gradient
// must be finite, returns the first item whose is not, else -1; `run` writes and cannot fail. The
// items must stay where they are in between.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "kernels_cpu.h"
#include "scratch_cpu.h"

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
// one sum [dim] per kPiece entries of the rows that have over a thousand entries.
class RowsRoad {
 public:
  int64_t prepare(const std::vector<RowsItem>& items, const SortedEntries& sorted,
                  Scratch& scratch);
  void run();

 private:
  // A row with so many entries that all threads sum it, in pieces, before the rest.
  struct LongRunWork {
    const RowsItem* item;
    int64_t begin, end;
    int64_t first_piece;  // counted over all long runs
    char* sums;           // [pieces, dim] in the arithmetic type

    int64_t pieces() const { return (end - begin + kPiece - 1) / kPiece; }
    int64_t sum_bytes() const {
      return item->dim * (item->param.storage == Storage::kFloat64 ? 8 : 4);
    }
  };
  struct Tasks {
    int64_t first;    // of this item, counted over all items
    int64_t entries;  // of each of its tasks
  };

  template <typename F>
  void for_each_part(const F& f) const;
  int64_t first_nonfinite();
  void find_long_runs();
  void sum_long_runs();

  const std::vector<RowsItem>* items_ = nullptr;
  SortedEntries sorted_;
  bool serial_ = true;
  bool summed_ = false;  // the long runs are
  std::vector<LongRunWork> long_work_;
  std::vector<LongRun> long_runs_;
  std::vector<Tasks> tasks_;
  int64_t task_count_ = 0;
};

}  // namespace tiger_ext
