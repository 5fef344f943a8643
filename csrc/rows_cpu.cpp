// SPDX-License-Identifier: Apache-2.0
//
// The rows road on the CPU: shares the sorted entries out among the threads. Work is cut by
// entries, not by rows; a row with very many entries is summed by all threads in pieces before the
// rest.
#include <algorithm>

#include "parallel_cpu.h"
#include "roads_cpu.h"

namespace tiger_ext {
namespace {

constexpr int64_t kElementsPerTask = 65536;
constexpr int64_t kSerialElements = 32768;
constexpr int64_t kLongRunStride = 1024;  // runs of twice this length are found for certain

struct LongRunWork {
  const RowsItem* item;
  int64_t begin, end;
  int64_t first_piece;  // of all pieces of all long runs
  void* sums;           // [pieces, dim]

  int64_t pieces() const { return (end - begin + kPiece - 1) / kPiece; }
};

// A run that holds both ends of a stride of the sorted entries is long; its bounds by bisection.
std::vector<LongRunWork> find_long_runs(const std::vector<RowsItem>& items,
                                        const SortedEntries& sorted) {
  std::vector<LongRunWork> found;
  int64_t pieces = 0;
  for (const RowsItem& item : items) {
    const int64_t end = item.first_entry + item.entries;
    for (int64_t i = item.first_entry; i + kLongRunStride < end; i += kLongRunStride) {
      const uint64_t row = sorted.row(i);
      if (sorted.row(i + kLongRunStride) != row) continue;
      if (!found.empty() && found.back().end > i) continue;
      const auto before = [&](uint64_t key) { return key >> sorted.position_bits < row; };
      const auto within = [&](uint64_t key) { return key >> sorted.position_bits <= row; };
      const uint64_t* keys = sorted.keys;
      const int64_t begin = std::partition_point(keys + item.first_entry, keys + i, before) - keys;
      const int64_t run_end = std::partition_point(keys + i, keys + end, within) - keys;
      found.push_back({&item, begin, run_end, pieces, nullptr});
      pieces += found.back().pieces();
    }
  }
  return found;
}

std::vector<LongRun> sum_long_runs(std::vector<LongRunWork>& work, const SortedEntries& sorted,
                                   Scratch& scratch) {
  if (work.empty()) return {};
  const CpuKernels& kernels = cpu_kernels();
  const auto width = [](const LongRunWork& w) {
    return static_cast<size_t>(w.item->dim) * (w.item->param.storage == Storage::kFloat64 ? 8 : 4);
  };
  size_t bytes = 0;
  for (const LongRunWork& w : work) bytes += w.pieces() * width(w);
  char* place = scratch.get<char>(Scratch::kPieces, bytes);
  for (LongRunWork& w : work) {
    w.sums = place;
    place += w.pieces() * width(w);
  }
  for_each_task(work.back().first_piece + work.back().pieces(), [&](int64_t piece) {
    const auto after =
        std::upper_bound(work.begin(), work.end(), piece,
                         [](int64_t p, const LongRunWork& w) { return p < w.first_piece; });
    const LongRunWork& w = *(after - 1);
    const int64_t local = piece - w.first_piece, begin = w.begin + local * kPiece;
    kernels.sum_piece(*w.item, sorted, begin, std::min(begin + kPiece, w.end),
                      static_cast<char*>(w.sums) + local * width(w));
  });
  for_each_task(static_cast<int64_t>(work.size()), [&](int64_t k) {
    kernels.combine_pieces(*work[k].item, work[k].sums, work[k].pieces());
  });
  std::vector<LongRun> runs;
  for (const LongRunWork& w : work) runs.push_back({w.begin, w.end, w.sums});
  return runs;
}

}  // namespace

void update_rows(const std::vector<RowsItem>& items, const SortedEntries& sorted,
                 Scratch& scratch) {
  const CpuKernels& kernels = cpu_kernels();
  int64_t elements = 0;
  for (const RowsItem& item : items) elements += item.entries * item.dim;
  if (elements <= kSerialElements || thread_count() == 1) {
    for (const RowsItem& item : items)
      kernels.rows(item, sorted, {}, item.first_entry, item.first_entry + item.entries);
    return;
  }

  std::vector<LongRunWork> work = find_long_runs(items, sorted);
  const std::vector<LongRun> runs = sum_long_runs(work, sorted, scratch);
  const LongRuns long_runs{runs.data(), static_cast<int64_t>(runs.size())};

  struct Tasks {
    int64_t first, entries;
  };
  std::vector<Tasks> tasks;
  int64_t count = 0;
  for (const RowsItem& item : items) {
    const int64_t entries = std::clamp<int64_t>(kElementsPerTask / item.dim, 1, 4096);
    tasks.push_back({count, entries});
    count += (item.entries + entries - 1) / entries;
  }
  for_each_task(count, [&](int64_t task) {
    const auto after = std::upper_bound(tasks.begin(), tasks.end(), task,
                                        [](int64_t t, const Tasks& x) { return t < x.first; });
    const size_t k = after - 1 - tasks.begin();
    const int64_t begin = (task - tasks[k].first) * tasks[k].entries;
    const int64_t end = std::min(begin + tasks[k].entries, items[k].entries);
    kernels.rows(items[k], sorted, long_runs, items[k].first_entry + begin,
                 items[k].first_entry + end);
  });
}

}  // namespace tiger_ext
