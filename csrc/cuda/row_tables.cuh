// SPDX-License-Identifier: Apache-2.0
//
// What the kernels that update rows have in common: sorted entries, the rows of a tile of them,
// tables of any strides.
#pragma once

#include <algorithm>

#include "cuda/multi_tensor.cuh"
#include "cuda/roads.h"
#include "cuda/vectors.cuh"

namespace tiger_ext {

constexpr int64_t kTargetBlocks = 2048;
constexpr int kTileElements = 32768;  // of a block, when there are more blocks than the target

TIGER_EXT_INLINE uint32_t column_tiles(int dim) {
  return static_cast<uint32_t>(dim + kColumnTile - 1) / kColumnTile;
}
TIGER_EXT_INLINE int column_end(int tile, int dim) {
  return dim - tile * kColumnTile < kColumnTile ? dim : (tile + 1) * kColumnTile;
}

// ------------------------------------------------------------------------------- sorted entries

// The sorted entries of one table, or from some entry on.
struct Entries {
  const uint64_t* keys;
  int entry_bits;

  __device__ uint64_t row(int64_t i) const { return keys[i] >> entry_bits; }
  __device__ int64_t entry(int64_t i) const {
    return static_cast<int64_t>(keys[i] & ((uint64_t{1} << entry_bits) - 1));
  }
  __device__ Entries from(int64_t i) const { return {keys + i, entry_bits}; }
  // The first of [begin, end) whose row is at least `wanted`.
  __device__ int64_t lower_bound(int64_t begin, int64_t end, uint64_t wanted) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (row(middle) < wanted) begin = middle + 1;
      else end = middle;
    }
    return begin;
  }
};

// What the two kernels of long runs and the update have in common: one table's entries.
struct TableEntries {
  Stream values;
  int64_t value_stride;
  int64_t entries;
  int64_t first_entry;
  uint64_t dropped_row;  // the row that does not exist
  void* sums;            // [2 * slots, dim] in the arithmetic type, see below
  int dim;

  __device__ Entries sorted(const Entries& all) const { return all.from(first_entry); }
};

// Of each kPiece neighbouring entries; see cuda/rows.cu.
TIGER_EXT_INLINE int64_t slots(int64_t entries) { return (entries + kPiece - 1) / kPiece; }

// The rows that begin in a block's tile of the entries.
struct RowsOfTile {
  int begins[kThreads + 1];  // from the start of the tile; one more: the last row's end
  int in_warp[kThreads / kWarp];
};

// Lists the rows that begin in the tile; returns how many. The last one may go on after the tile:
// the block looks kPiece entries ahead, so its length is right up to kPiece and beyond that only
// known to be greater, which says that it is a long run.
__device__ __forceinline__ int find_rows(int64_t entries, int tile_entries, const Entries& sorted,
                                         int64_t begin, RowsOfTile& rows) {
  static_assert(kThreads == kPiece);
  const int64_t left = entries - begin;
  const int tile = static_cast<int>(left < tile_entries ? left : tile_entries);
  const int thread = static_cast<int>(threadIdx.x);
  bool begins = false;
  if (thread < tile) begins = begin + thread == 0 || sorted.row(thread - 1) != sorted.row(thread);
  const unsigned ballot = __ballot_sync(kFullWarp, begins);
  if (thread % kWarp == 0) rows.in_warp[thread / kWarp] = __popc(ballot);
  const bool goes_on = tile + thread < left && sorted.row(tile + thread) == sorted.row(tile - 1);
  const int beyond = __syncthreads_count(goes_on);  // rows are sorted: the first so many

  int before = __popc(ballot & ((1u << thread % kWarp) - 1)), count = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < thread / kWarp) before += rows.in_warp[w];
    count += rows.in_warp[w];
  }
  if (begins) rows.begins[before] = thread;
  if (thread == 0) rows.begins[count] = tile + beyond;
  __syncthreads();
  return count;
}

// The values of one run's entries, columns [c, c + kWidth).
template <typename T, typename Access, int kWidth>
struct RunValues {
  __device__ static void load(const TableEntries& t, const Entries& run, int i, int c,
                              T (&out)[kWidth]) {
    load_vector<Access>(t.values, run.entry(i) * t.value_stride + c, true, out);
  }

  // Entries [i, i + kCount) of the run, in order.
  template <int kCount>
  __device__ static void add(const TableEntries& t, const Entries& run, int i, int c,
                             T (&sum)[kWidth]) {
    T x[kCount][kWidth];
#pragma unroll
    for (int k = 0; k < kCount; ++k) load(t, run, i + k, c, x[k]);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int w = 0; w < kWidth; ++w) sum[w] += x[k][w];
  }
};

// ------------------------------------------------------------------------------------- layouts

// Where row r lies: contiguous, at a fixed distance from the next.
struct StridedRows {
  int64_t row_stride;
  __device__ int64_t offset(int64_t row, int64_t column) const { return row * row_stride + column; }
};

// Where element (row, column) lies in a table of any strides.
struct AnyRows {
  int64_t row_stride;
  int8_t row_dims, inner_dims;  // 0: row * row_stride, + column
  int64_t sizes[2][kMaxSeparateDims];
  int64_t strides[2][kMaxSeparateDims];

  __device__ int64_t offset(int64_t row, int64_t column) const {
    return (row_dims == 0 ? row * row_stride : unravel(0, row_dims, row)) +
           (inner_dims == 0 ? column : unravel(1, inner_dims, column));
  }

 private:
  __device__ int64_t unravel(int which, int dims, int64_t index) const {
    int64_t result = 0;
    for (int d = dims; d-- > 0;) {
      result += index % sizes[which][d] * strides[which][d];
      index /= sizes[which][d];
    }
    return result;
  }
};

inline void set_layout(StridedRows& rows, const RowLayout& layout) {
  rows.row_stride = layout.row_stride;
}

inline void set_layout(AnyRows& rows, const RowLayout& layout) {
  rows.row_stride = layout.row_stride;
  rows.row_dims = static_cast<int8_t>(layout.dims);
  rows.inner_dims = static_cast<int8_t>(layout.inner_dims);
  std::copy(layout.sizes, layout.sizes + layout.dims, rows.sizes[0]);
  std::copy(layout.strides, layout.strides + layout.dims, rows.strides[0]);
  std::copy(layout.inner_sizes, layout.inner_sizes + layout.inner_dims, rows.sizes[1]);
  std::copy(layout.inner_strides, layout.inner_strides + layout.inner_dims, rows.strides[1]);
}

inline bool is_strided(const RowLayout& layout) {
  return layout.dims == 0 && layout.inner_dims == 0;
}

// Whether the rows of a stream can be read in vectors of `width` elements.
inline bool is_aligned(const Stream& s, int64_t row_stride, int64_t dim, int width) {
  return dim % width == 0 && row_stride % width == 0 &&
         reinterpret_cast<uintptr_t>(s.data) % (storage_size(s.storage) * width) == 0;
}

// Entries of a block: enough blocks to fill the device, then up to kTileElements each.
inline int tile_entries(int64_t entries, int dim, int lanes) {
  const int64_t columns = std::min(dim, kColumnTile), tiles = column_tiles(dim);
  int tile = kThreads / lanes;
  while (tile < kThreads && 2 * tile * columns <= kTileElements &&
         entries * tiles > kTargetBlocks * tile)
    tile *= 2;
  return tile;
}

inline TableEntries table_entries(const RowsItem& item, void* sums) {
  return {item.values,
          item.value_stride,
          item.entries,
          item.first_entry,
          static_cast<uint64_t>(item.first_row + item.rows),
          sums,
          static_cast<int>(item.dim)};
}

}  // namespace tiger_ext
