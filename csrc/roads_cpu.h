// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "kernels_cpu.h"
#include "scratch_cpu.h"

namespace tiger_ext {

// Updates every touched row of all items. Costs 4 bytes x dim per kPiece entries of rows with over
// a thousand entries in scratch memory, nothing else.
void update_rows(const std::vector<RowsItem>& items, const SortedEntries& sorted, Scratch& scratch);

// Updates every element of all items.
void update_dense(const std::vector<DenseItem>& items);

}  // namespace tiger_ext
