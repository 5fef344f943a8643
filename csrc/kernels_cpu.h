// SPDX-License-Identifier: Apache-2.0
//
// The interface between the drivers (dense_cpu.cpp, rows_cpu.cpp: threads, scratch, checks) and the
// leaf kernels (kernels_cpu.inl, compiled once per instruction set). Plain pointers, no torch.
#pragma once

#include <cstdint>

#include "storage.h"
#include "update_rules.h"

namespace tiger_ext {

constexpr int kMaxStates = 2;

// A run of a row's entries is summed in pieces of this many, each left to right, then the pieces'
// sums left to right. The order depends on nothing else, so neither does any bit of the result.
constexpr int64_t kPiece = 256;

struct Stream {
  void* data = nullptr;
  Storage storage = Storage::kFloat32;
};

// One parameter with a strided gradient. All streams share one element order.
struct DenseItem {
  const RuleParams* rule = nullptr;
  Stream param;
  Stream grad;
  Stream states[kMaxStates];
  int64_t numel = 0;
};

// Where the vector of row r lies, in elements from the start of the tensor.
struct RowLayout {
  int64_t row_stride = 0;  // offset = r * row_stride, when dims == 0
  int64_t dims = 0;        // else r is unravelled over sizes[dims]
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  const int64_t* inner = nullptr;  // offset of each element of the vector; null: contiguous

  int64_t offset(int64_t row) const {
    if (dims == 0) return row * row_stride;
    int64_t result = 0;
    for (int64_t d = dims; d-- > 0;) {
      result += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return result;
  }
};

// One parameter with a row-sparse gradient. Its entries are the global entries
// [first_entry, first_entry + entries), its rows the global rows [first_row, first_row + rows).
struct RowsItem {
  const RuleParams* rule = nullptr;
  Stream param;
  Stream states[kMaxStates];
  Stream values;  // entry e starts at e * value_stride, contiguous from there
  RowLayout param_layout;
  RowLayout state_layouts[kMaxStates];
  int64_t value_stride = 0;
  int64_t dim = 0;
  int64_t rows = 0;
  int64_t entries = 0;
  int64_t first_row = 0;
  int64_t first_entry = 0;
};

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
  // The runs of `item` that start in [begin, end) of the sorted entries.
  void (*rows)(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
               int64_t begin, int64_t end);
  // The sum of at most kPiece entries [begin, end) of one row, left to right, into out[dim].
  void (*sum_piece)(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end,
                    void* out);
  // Adds the vectors pieces[1], pieces[2], ... pieces[count - 1], each [dim], to pieces[0] in
  // order.
  void (*combine_pieces)(const RowsItem& item, void* pieces, int64_t count);
};

// The best set that this processor can run, or the one that TIGER_EXT_CPU_ISA names.
const CpuKernels& cpu_kernels();

extern const CpuKernels kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
#endif

}  // namespace tiger_ext
