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

void update_dense(const std::vector<DenseItem>& items) {
  const CpuKernels& kernels = cpu_kernels();
  std::vector<int64_t> starts;
  starts.reserve(items.size());
  int64_t total = 0;
  for (const DenseItem& item : items) {
    starts.push_back(total);
    total += item.numel;
  }
  for_each_task((total + kElementsPerTask - 1) / kElementsPerTask, [&](int64_t task) {
    const int64_t begin = task * kElementsPerTask;
    const int64_t end = std::min(begin + kElementsPerTask, total);
    size_t k = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; k < items.size() && starts[k] < end; ++k)
      kernels.dense(items[k], std::max(begin - starts[k], int64_t{0}),
                    std::min(end - starts[k], items[k].numel));
  });
}

}  // namespace tiger_ext
