// SPDX-License-Identifier: Apache-2.0
#include "cpu/long_runs.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace tiger_ext {
namespace {

constexpr int64_t kLongRunStride = 1024;  // runs of twice this length are found for certain

}  // namespace

void LongRunSums::prepare(const std::vector<RowsItem>& items, const SortedEntries& sorted,
                          Scratch& scratch) {
  sorted_ = sorted;
  find(items);
  int64_t bytes = 0;
  for (const Work& w : work_) bytes += w.bytes();
  char* place = bytes > 0 ? scratch.get<char>(Scratch::kPieces, bytes) : nullptr;
  for (Work& w : work_) {
    w.sums = place;
    place += w.bytes();
    runs_.push_back({w.begin, w.end, w.sums});
  }
}

// A run that holds both ends of a stride of the sorted entries is long; its bounds by bisection.
void LongRunSums::find(const std::vector<RowsItem>& items) {
  int64_t pieces = 0;
  for (const RowsItem& item : items) {
    if (!item.values.data) continue;
    const int64_t end = item.first_entry + item.entries;
    for (int64_t i = item.first_entry; i + kLongRunStride < end; i += kLongRunStride) {
      const uint64_t row = sorted_.row(i);
      if (sorted_.row(i + kLongRunStride) != row) continue;
      if (!work_.empty() && work_.back().end > i) continue;  // known
      const auto before = [&](uint64_t key) { return key >> sorted_.position_bits < row; };
      const auto within = [&](uint64_t key) { return key >> sorted_.position_bits <= row; };
      const uint64_t* keys = sorted_.keys;
      const int64_t begin = std::partition_point(keys + item.first_entry, keys + i, before) - keys;
      const int64_t run_end = std::partition_point(keys + i, keys + end, within) - keys;
      work_.push_back({&item, begin, run_end, pieces, nullptr});
      pieces += work_.back().pieces();
    }
  }
}

void LongRunSums::sum() {
  if (work_.empty() || summed_) return;
  summed_ = true;
  const CpuKernels& kernels = cpu_kernels();
  for_each_task(work_.back().first_piece + work_.back().pieces(), [&](int64_t piece) {
    const auto after = std::upper_bound(work_.begin(), work_.end(), piece,
                                        [](int64_t p, const Work& w) { return p < w.first_piece; });
    const Work& w = *(after - 1);
    const int64_t local = piece - w.first_piece, begin = w.begin + local * kPiece;
    kernels.sum_piece(*w.item, sorted_, begin, std::min(begin + kPiece, w.end),
                      w.sums + local * w.sum_bytes());
  });
  for_each_task(static_cast<int64_t>(work_.size()), [&](int64_t k) {
    kernels.combine_pieces(*work_[k].item, work_[k].sums, work_[k].pieces());
  });
}

}  // namespace tiger_ext
