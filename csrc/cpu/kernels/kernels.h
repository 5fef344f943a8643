// SPDX-License-Identifier: Apache-2.0
//
// The interface between the drivers (cpu/dense.cpp, cpu/rows.cpp: threads, scratch, checks) and the
// leaf kernels (cpu/kernels/kernels.inl, compiled once per instruction set). Plain pointers, no
// torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "rules/history.h"
#include "rules/norm_part.h"
#include "rules/rule_list.h"
#include "step/items.h"

namespace tiger_ext {

// A sorted list of entries: key = global row << position_bits | global position.
struct SortedEntries {
  const uint64_t* keys = nullptr;
  int position_bits = 0;

  uint64_t row(int64_t i) const { return keys[i] >> position_bits; }
  int64_t position(int64_t i) const {
    return static_cast<int64_t>(keys[i] & ((uint64_t{1} << position_bits) - 1));
  }
};

// A run so long that its pieces were summed by several threads beforehand.
struct LongRun {
  int64_t begin = 0;
  int64_t end = 0;
  const void* sum = nullptr;  // [dim], arithmetic type
};

struct LongRuns {
  const LongRun* data = nullptr;  // by ascending begin
  int64_t size = 0;
};

struct CpuKernels {
  const char* name;
  // Elements [begin, end) of a dense item.
  void (*dense)(const DenseItem& item, int64_t begin, int64_t end);
  // What elements [begin, end) of a dense item are like, as far as its rule asks.
  Facts (*look)(const DenseItem& item, int64_t begin, int64_t end);
  // The runs of `item` that start in [begin, end) of the sorted entries.
  void (*rows)(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
               int64_t begin, int64_t end);
  // Whether the sums of these runs are finite.
  bool (*rows_finite)(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
                      int64_t begin, int64_t end);
  // The touched ones of rows [begin, end) of a direct item.
  void (*direct)(const RowsItem& item, int64_t begin, int64_t end);
  bool (*direct_finite)(const RowsItem& item, int64_t begin, int64_t end);
  // Brings rows ids[begin, end) of a table, or without ids rows [begin, end), up to its rule's
  // `current` step. Returns how many were written. Ids may repeat, in other threads too.
  int64_t (*catch_up)(const RowsItem& item, const int64_t* ids, int64_t begin, int64_t end);
  // The sum of at most kPiece entries [begin, end) of one row, left to right, into out[dim].
  void (*sum_piece)(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end,
                    void* out);
  // Adds the vectors pieces[1], pieces[2], ... pieces[count - 1], each [dim], to pieces[0] in
  // order.
  void (*combine_pieces)(const RowsItem& item, void* pieces, int64_t count);
  // What the sums of the runs of two and more entries that start in [begin, end) contribute to
  // their p-norm. Sets repeated[position] of every entry of every run that starts there.
  NormPart (*repeated_rows_norm)(const RowsItem& item, const SortedEntries& sorted,
                                 const LongRuns& long_runs, int64_t begin, int64_t end, double p,
                                 uint8_t* repeated);
  // The same of entries [begin, end) of the item that are not repeated[entry].
  NormPart (*other_rows_norm)(const RowsItem& item, int64_t begin, int64_t end, double p,
                              const uint8_t* repeated);
};

// The best set that this processor can run, or the one that TIGER_EXT_CPU_ISA names.
const CpuKernels& cpu_kernels();

extern const CpuKernels kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

}  // namespace tiger_ext
