// SPDX-License-Identifier: Apache-2.0
#include "step/faults.h"

#include <algorithm>
#include <atomic>

namespace tiger_ext {

FaultSlot* Faults::slot(int device, Make make) {
  const std::lock_guard lock(mutex_);
  Own& own = slots_[device];
  if (!own.slot) own.slot = make();
  return own.slot.get();
}

std::optional<Fault> Faults::take() {
  const std::lock_guard lock(mutex_);
  for (auto& [device, own] : slots_) {
    if (!own.slot) continue;
    for (int kind = 0; kind < kFaultKinds; ++kind) {
      FaultCell& cell = own.slot->cells[kind];
      const uint32_t ready = *const_cast<volatile uint32_t*>(&cell.ready);
      if (ready == cell.taken) continue;
      std::atomic_thread_fence(std::memory_order_acquire);
      Fault fault{static_cast<FaultKind>(kind), cell.details, 0};
      std::atomic_thread_fence(std::memory_order_release);
      *const_cast<volatile uint32_t*>(&cell.taken) = ready;
      // A kernel counts its entries before it looks at `taken`. So whoever still finds the old
      // report there, and leaves it at that, is counted here.
      std::atomic_thread_fence(std::memory_order_seq_cst);
      const uint64_t entries = *const_cast<volatile unsigned long long*>(&cell.entries);
      // 0: the entries of this report were counted with those of the one before.
      fault.entries = std::max<uint64_t>(entries - own.told[kind], 1);
      own.told[kind] = entries;
      return fault;
    }
  }
  return std::nullopt;
}

}  // namespace tiger_ext
