// SPDX-License-Identifier: Apache-2.0
//
// Rows with so many entries that all threads sum them, in pieces, before anything else is done with
// the rows. The order of the additions is that of any other row.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/scratch.h"

namespace tiger_ext {

class LongRunSums {
 public:
  // Finds the long runs of items with values, and room for their sums: one [dim] for each kPiece
  // entries. The items must stay where they are.
  void prepare(const std::vector<RowsItem>& items, const SortedEntries& sorted, Scratch& scratch);
  // Sums them, the first time it is called.
  void sum();

  // The sums are there after sum().
  LongRuns runs() const { return {runs_.data(), static_cast<int64_t>(runs_.size())}; }

 private:
  struct Work {
    const RowsItem* item;
    int64_t begin, end;
    int64_t first_piece;  // counted over all long runs
    char* sums;           // [pieces, dim] in the arithmetic type

    int64_t pieces() const { return (end - begin + kPiece - 1) / kPiece; }
    int64_t sum_bytes() const {
      return item->dim * (item->param.storage == Storage::kFloat64 ? 8 : 4);
    }
    // Of all pieces; the next run's sums may be of a wider type.
    int64_t bytes() const { return (pieces() * sum_bytes() + 7) / 8 * 8; }
  };

  void find(const std::vector<RowsItem>& items);

  SortedEntries sorted_;
  bool summed_ = false;
  std::vector<Work> work_;
  std::vector<LongRun> runs_;
};

}  // namespace tiger_ext
