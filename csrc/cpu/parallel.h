// SPDX-License-Identifier: Apache-2.0
//
// Work sharing on ATen's thread pool. Tasks compute alike in every thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "cpu/float_mode.h"

namespace tiger_ext {

inline int64_t thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// f(task) for every task in [0, tasks), handed out one by one: a thread that is slow, or that got
// costly tasks, simply does fewer. Tasks must be independent of each other and of who runs them.
template <typename F>
void for_each_task(int64_t tasks, const F& f) {
  const int64_t threads = std::min(thread_count(), tasks);
  if (threads <= 1) {
    const FloatMode mode;
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const FloatMode mode;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
  });
}

}  // namespace tiger_ext
