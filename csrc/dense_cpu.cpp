// SPDX-License-Identifier: Apache-2.0
//
// The dense road on the CPU: all tensors of a step are one long range of elements, cut evenly, so
// that a thousand small tensors and one large one scale alike.
#include <algorithm>

#include "parallel_cpu.h"
#include "roads_cpu.h"

namespace tiger_ext {
namespace {

constexpr int64_t kElementsPerTask = 32768;

}  // namespace

void DenseRoad::prepare(const std::vector<DenseItem>& items) {
  items_ = &items;
  starts_.reserve(items.size());
  for (const DenseItem& item : items) {
    starts_.push_back(elements_);
    elements_ += item.numel;
  }
}

void DenseRoad::run() const {
  const CpuKernels& kernels = cpu_kernels();
  for_each_task((elements_ + kElementsPerTask - 1) / kElementsPerTask, [&](int64_t task) {
    const int64_t begin = task * kElementsPerTask;
    const int64_t end = std::min(begin + kElementsPerTask, elements_);
    size_t k = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    for (; k < starts_.size() && starts_[k] < end; ++k) {
      const DenseItem& item = (*items_)[k];
      kernels.dense(item, std::max(begin - starts_[k], int64_t{0}),
                    std::min(end - starts_[k], item.numel));
    }
  });
}

}  // namespace tiger_ext
