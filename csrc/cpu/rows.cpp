// SPDX-License-Identifier: Apache-2.0
//
// The rows road on the CPU: shares the sorted entries out among the threads. Work is cut by
// entries, not by rows; a row with very many entries is summed by all threads in pieces before the
// rest.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/roads.h"

namespace tiger_ext {
namespace {

constexpr int64_t kElementsPerTask = 65536;
constexpr int64_t kMaxEntriesPerTask = 4096;
constexpr int64_t kSerialElements = 32768;  // below this a second thread costs more than it saves

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
  long_runs_.prepare(items, sorted, scratch);
  return first_nonfinite();
}

int64_t RowsRoad::first_nonfinite() {
  const auto raises = [](const RowsItem& item) {
    return item.rule.params->nonfinite == Nonfinite::kRaise && item.values.data;
  };
  if (std::none_of(items_->begin(), items_->end(), raises)) return -1;
  long_runs_.sum();
  std::atomic<int64_t> bad{static_cast<int64_t>(items_->size())};
  for_each_part([&](int64_t k, int64_t begin, int64_t end) {
    const RowsItem& item = (*items_)[k];
    if (!raises(item) || cpu_kernels().rows_finite(item, sorted_, long_runs_.runs(), begin, end))
      return;
    int64_t known = bad;
    while (k < known && !bad.compare_exchange_weak(known, k)) {
    }
  });
  return bad == static_cast<int64_t>(items_->size()) ? -1 : bad.load();
}

void RowsRoad::run() {
  if (!items_) return;
  long_runs_.sum();
  for_each_part([&](int64_t k, int64_t begin, int64_t end) {
    cpu_kernels().rows((*items_)[k], sorted_, long_runs_.runs(), begin, end);
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
