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
constexpr int64_t kMaxEntriesPerTask = 4096;
constexpr int64_t kSerialElements = 32768;  // below this a second thread costs more than it saves
constexpr int64_t kLongRunStride = 1024;    // runs of twice this length are found for certain

}  // namespace

int64_t RowsRoad::prepare(const std::vector<RowsItem>& items, const SortedEntries& sorted,
                          Scratch& scratch) {
  items_ = &items;
  sorted_ = sorted;
  int64_t elements = 0;
  for (const RowsItem& item : items) elements += item.entries * item.dim;
  serial_ = elements <= kSerialElements || thread_count() == 1;
  if (serial_) return first_nonfinite();

  for (const RowsItem& item : items) {
    const int64_t entries = std::clamp<int64_t>(kElementsPerTask / std::max<int64_t>(item.dim, 1),
                                                1, kMaxEntriesPerTask);
    tasks_.push_back({task_count_, entries});
    task_count_ += (item.entries + entries - 1) / entries;
  }
  find_long_runs();
  int64_t bytes = 0;
  for (const LongRunWork& w : long_work_) bytes += w.pieces() * w.sum_bytes();
  char* place = bytes > 0 ? scratch.get<char>(Scratch::kPieces, bytes) : nullptr;
  for (LongRunWork& w : long_work_) {
    w.sums = place;
    place += w.pieces() * w.sum_bytes();
    long_runs_.push_back({w.begin, w.end, w.sums});
  }
  return first_nonfinite();
}

int64_t RowsRoad::first_nonfinite() {
  const auto raises = [](const RowsItem& item) {
    return item.rule.params->nonfinite == Nonfinite::kRaise && item.values.data;
  };
  if (std::none_of(items_->begin(), items_->end(), raises)) return -1;
  sum_long_runs();
  std::atomic<int64_t> bad{static_cast<int64_t>(items_->size())};
  for_each_part([&](int64_t k, int64_t begin, int64_t end) {
    const RowsItem& item = (*items_)[k];
    const LongRuns long_runs{long_runs_.data(), static_cast<int64_t>(long_runs_.size())};
    if (!raises(item) || cpu_kernels().rows_finite(item, sorted_, long_runs, begin, end)) return;
    int64_t known = bad;
    while (k < known && !bad.compare_exchange_weak(known, k)) {
    }
  });
  return bad == static_cast<int64_t>(items_->size()) ? -1 : bad.load();
}

// A run that holds both ends of a stride of the sorted entries is long; its bounds by bisection.
void RowsRoad::find_long_runs() {
  int64_t pieces = 0;
  for (const RowsItem& item : *items_) {
    if (!item.values.data) continue;
    const int64_t end = item.first_entry + item.entries;
    for (int64_t i = item.first_entry; i + kLongRunStride < end; i += kLongRunStride) {
      const uint64_t row = sorted_.row(i);
      if (sorted_.row(i + kLongRunStride) != row) continue;
      if (!long_work_.empty() && long_work_.back().end > i) continue;  // known
      const auto before = [&](uint64_t key) { return key >> sorted_.position_bits < row; };
      const auto within = [&](uint64_t key) { return key >> sorted_.position_bits <= row; };
      const uint64_t* keys = sorted_.keys;
      const int64_t begin = std::partition_point(keys + item.first_entry, keys + i, before) - keys;
      const int64_t run_end = std::partition_point(keys + i, keys + end, within) - keys;
      long_work_.push_back({&item, begin, run_end, pieces, nullptr});
      pieces += long_work_.back().pieces();
    }
  }
}

void RowsRoad::sum_long_runs() {
  if (long_work_.empty() || summed_) return;
  summed_ = true;
  const CpuKernels& kernels = cpu_kernels();
  for_each_task(long_work_.back().first_piece + long_work_.back().pieces(), [&](int64_t piece) {
    const auto after =
        std::upper_bound(long_work_.begin(), long_work_.end(), piece,
                         [](int64_t p, const LongRunWork& w) { return p < w.first_piece; });
    const LongRunWork& w = *(after - 1);
    const int64_t local = piece - w.first_piece, begin = w.begin + local * kPiece;
    kernels.sum_piece(*w.item, sorted_, begin, std::min(begin + kPiece, w.end),
                      w.sums + local * w.sum_bytes());
  });
  for_each_task(static_cast<int64_t>(long_work_.size()), [&](int64_t k) {
    kernels.combine_pieces(*long_work_[k].item, long_work_[k].sums, long_work_[k].pieces());
  });
}

void RowsRoad::run() {
  if (!items_) return;
  sum_long_runs();
  const LongRuns long_runs{long_runs_.data(), static_cast<int64_t>(long_runs_.size())};
  for_each_part([&](int64_t k, int64_t begin, int64_t end) {
    cpu_kernels().rows((*items_)[k], sorted_, long_runs, begin, end);
  });
}

// f(item, begin, end) for parts of the sorted entries.
template <typename F>
void RowsRoad::for_each_part(const F& f) const {
  if (serial_) {
    for (size_t k = 0; k < items_->size(); ++k) {
      const RowsItem& item = (*items_)[k];
      f(static_cast<int64_t>(k), item.first_entry, item.first_entry + item.entries);
    }
    return;
  }
  for_each_task(task_count_, [&](int64_t task) {
    const auto after = std::upper_bound(tasks_.begin(), tasks_.end(), task,
                                        [](int64_t t, const Tasks& x) { return t < x.first; });
    const int64_t k = after - 1 - tasks_.begin();
    const RowsItem& item = (*items_)[k];
    const int64_t begin = (task - tasks_[k].first) * tasks_[k].entries;
    const int64_t end = std::min(begin + tasks_[k].entries, item.entries);
    f(k, item.first_entry + begin, item.first_entry + end);
  });
}

}  // namespace tiger_ext
