// SPDX-License-Identifier: Apache-2.0
//
// The row plan: which entries make up which row. All tables of a step share one key space, so that
// many small tables cost no more than one large one.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cpu/scratch.h"

namespace tiger_ext {

struct BadIndex {
  int64_t item = -1;  // none
  int64_t entry = 0;
  int64_t dimension = 0;
};

// Checks every index and sorts all entries by (table, row, position). Of several bad indices the
// first is reported, and then `sorted` is not set. Memory: 16 bytes an entry, of `scratch`.
BadIndex plan_rows(const std::vector<RowsItem>& items, const std::vector<RowIndices>& indices,
                   Scratch& scratch, SortedEntries& sorted);

}  // namespace tiger_ext
