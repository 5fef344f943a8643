// SPDX-License-Identifier: Apache-2.0
//
// The row plan on CUDA. Every entry becomes one 64-bit key, (global row << entry_bits | entry of
// its table): keys alone are sorted, by the bits of the row only, which moves the same 8 bytes an
// entry as 32-bit rows with 32-bit positions would and knows no limit short of 64 bits.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/faults.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/roads.h"

namespace tiger_ext {
namespace {

constexpr int kEntriesPerThread = 4;

// The first faulty entry and how many there are. Both start as all ones.
struct FaultWord {
  unsigned long long first;  // global position << kDimensionBits | dimension
  unsigned long long count;  // minus one
};
constexpr int kDimensionBits = 4;
constexpr unsigned kOrder = kMaxSeparateDims;  // in the place of a dimension: not coalesced

struct TableIndices {
  const int64_t* data;
  int64_t dim_stride;
  int64_t entry_stride;
  int64_t sizes[kMaxSeparateDims];
  int64_t entries;
  int64_t first_entry;
  int64_t first_row;
  int64_t rows;
  UpdatePlace place;
  int sparse_dim;

  __device__ int64_t index(int64_t entry, int d) const {
    return data[d * dim_stride + entry * entry_stride];
  }

  // The row of an entry; `rows`, and the first bad dimension, if an index is out of range.
  __device__ int64_t row(int64_t entry, int& bad_dimension) const {
    int64_t row = 0;
    for (int d = 0; d < sparse_dim; ++d) {
      const int64_t i = index(entry, d);
      if (i < 0 || i >= sizes[d]) {
        bad_dimension = d;
        return rows;
      }
      row = row * sizes[d] + i;
    }
    return row;
  }
};

struct PackKeys {
  using Item = TableIndices;
  static constexpr int kSharedBytes = 0, kMinBlocks = 4;

  uint64_t* keys;
  int entry_bits;
  bool coalesced;  // all tables; then the keys will not be sorted
  FaultWord* fault;

  int64_t blocks(const Item& item) const {
    constexpr int64_t kPerBlock = kThreads * kEntriesPerThread;
    return (item.entries + kPerBlock - 1) / kPerBlock;
  }

  __device__ void operator()(const Item& item, uint32_t block) const {
    const int64_t begin = static_cast<int64_t>(block) * kThreads * kEntriesPerThread;
#pragma unroll
    for (int k = 0; k < kEntriesPerThread; ++k) {
      const int64_t e = begin + k * kThreads + threadIdx.x;
      if (e >= item.entries) return;
      int dimension = 0;
      const int64_t row = item.row(e, dimension);
      if (row == item.rows) {
        note(item, e, static_cast<unsigned>(dimension));
      } else if (coalesced && e > 0) {
        const int64_t before = item.row(e - 1, dimension);
        if (before >= row && before != item.rows) note(item, e, kOrder);
      }
      keys[item.first_entry + e] =
          static_cast<uint64_t>(item.first_row + row) << entry_bits | static_cast<uint64_t>(e);
    }
  }

 private:
  __device__ void note(const Item& item, int64_t entry, unsigned dimension) const {
    atomicMin(
        &fault->first,
        static_cast<unsigned long long>(item.first_entry + entry) << kDimensionBits | dimension);
    atomicAdd(&fault->count, 1ull);
  }
};

// Tells the host of the first fault: the one thread that has its table.
struct ReportFault {
  using Item = TableIndices;
  static constexpr int kSharedBytes = 0, kMinBlocks = 4;

  const FaultWord* fault;
  FaultSlot* report;

  int64_t blocks(const Item&) const { return 1; }

  __device__ void operator()(const Item& item, uint32_t) const {
    const unsigned long long first = fault->first;
    const int64_t entry = static_cast<int64_t>(first >> kDimensionBits) - item.first_entry;
    if (threadIdx.x != 0 || first == ~0ull || entry < 0 || entry >= item.entries) return;
    const int dimension = static_cast<int>(first & ((1u << kDimensionBits) - 1));
    const bool order = dimension == static_cast<int>(kOrder);
    const int d = order ? 0 : dimension;
    report_fault(report, order ? FaultKind::kNotCoalesced : FaultKind::kIndexOutOfRange,
                 {item.place, entry, item.index(entry, d), d, item.sizes[d]}, fault->count + 1);
  }
};

int bit_width(uint64_t x) {
  int bits = 0;
  for (; x != 0; x >>= 1) ++bits;
  return bits;
}

}  // namespace

SortedEntriesCuda plan_rows_cuda(const std::vector<RowsItem>& items,
                                 const std::vector<RowIndices>& indices,
                                 const std::vector<UpdatePlace>& places,
                                 const DeviceContext& context) {
  const RowsItem& last = items.back();
  const int64_t n = last.first_entry + last.entries;
  const int64_t rows = last.first_row + last.rows + 1;
  int64_t most_entries = 0;
  for (const RowsItem& item : items) most_entries = std::max(most_entries, item.entries);
  const int entry_bits = bit_width(static_cast<uint64_t>(most_entries - 1));
  const int row_bits = bit_width(static_cast<uint64_t>(rows - 1));
  if (entry_bits + row_bits > 64)
    throw std::length_error("tiger_ext: " + std::to_string(n) + " gradient entries over " +
                            std::to_string(rows) + " rows do not fit 64-bit sort keys");

  std::vector<TableIndices> tables(items.size());
  bool coalesced = true;
  for (size_t k = 0; k < items.size(); ++k) {
    TableIndices& t = tables[k];
    t.data = indices[k].data;
    t.dim_stride = indices[k].dim_stride;
    t.entry_stride = indices[k].entry_stride;
    t.sparse_dim = static_cast<int>(indices[k].sparse_dim);
    std::copy(indices[k].sizes, indices[k].sizes + t.sparse_dim, t.sizes);
    t.entries = items[k].entries;
    t.first_entry = items[k].first_entry;
    t.first_row = items[k].first_row;
    t.rows = items[k].rows;
    t.place = places[k];
    coalesced = coalesced && indices[k].coalesced;
  }
  auto* const fault = static_cast<FaultWord*>(context.allocate(sizeof(FaultWord)));
  auto* const keys = static_cast<uint64_t*>(context.allocate(n * 8));
  check_cuda(cudaMemsetAsync(fault, 0xFF, sizeof(FaultWord), context.stream), "clearing memory");
  multi_tensor_apply(tables, PackKeys{keys, entry_bits, coalesced, fault}, context.stream);
  multi_tensor_apply(tables, ReportFault{fault, context.faults}, context.stream);
  if (coalesced) return {keys, entry_bits};

  cub::DoubleBuffer<uint64_t> buffers(keys, static_cast<uint64_t*>(context.allocate(n * 8)));
  size_t bytes = 0;
  const auto sort = [&](void* memory) {
    check_cuda(cub::DeviceRadixSort::SortKeys(memory, bytes, buffers, n, entry_bits,
                                              entry_bits + row_bits, context.stream),
               "sorting rows");
  };
  sort(nullptr);
  sort(context.allocate(static_cast<int64_t>(bytes)));
  return {buffers.Current(), entry_bits};
}

}  // namespace tiger_ext
