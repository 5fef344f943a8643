// SPDX-License-Identifier: Apache-2.0
//
// The direct road on the CPU: strided gradients of which only some rows are touched. One read of
// the gradient finds them; only their rows of parameter and state are read or written.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/roads.h"

namespace tiger_ext {
namespace {

constexpr int64_t kElementsPerTask = 65536;

int64_t rows_per_task(const RowsItem& item) {
  return std::max<int64_t>(kElementsPerTask / std::max<int64_t>(item.dim, 1), 1);
}

}  // namespace

int64_t DirectRoad::prepare(const std::vector<RowsItem>& items) {
  items_ = &items;
  for (const RowsItem& item : items) {
    starts_.push_back(task_count_);
    task_count_ += (item.rows + rows_per_task(item) - 1) / rows_per_task(item);
  }
  std::atomic<int64_t> bad{static_cast<int64_t>(items.size())};
  for_each_part([&](size_t k, int64_t begin, int64_t end) {
    const RuleParams& rule = *(*items_)[k].rule.params;
    if (rule.nonfinite != Nonfinite::kRaise || !rule.adds) return;
    if (cpu_kernels().direct_finite((*items_)[k], begin, end)) return;
    int64_t known = bad;
    while (static_cast<int64_t>(k) < known &&
           !bad.compare_exchange_weak(known, static_cast<int64_t>(k))) {
    }
  });
  return bad == static_cast<int64_t>(items.size()) ? -1 : bad.load();
}

void DirectRoad::run() const {
  for_each_part([&](size_t k, int64_t begin, int64_t end) {
    cpu_kernels().direct((*items_)[k], begin, end);
  });
}

// f(item, begin, end) for parts of the rows of all items.
template <typename F>
void DirectRoad::for_each_part(const F& f) const {
  for_each_task(task_count_, [&](int64_t task) {
    const size_t k = std::upper_bound(starts_.begin(), starts_.end(), task) - starts_.begin() - 1;
    const RowsItem& item = (*items_)[k];
    const int64_t begin = (task - starts_[k]) * rows_per_task(item);
    f(k, begin, std::min(begin + rows_per_task(item), item.rows));
  });
}

}  // namespace tiger_ext
