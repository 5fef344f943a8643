// SPDX-License-Identifier: Apache-2.0
//
// How kernels report to the host (step/faults.h).
#pragma once

#include <cuda_runtime.h>

#include "step/faults.h"

namespace tiger_ext {

// Takes the cell for one report, which will have this number; false if the host has yet to read
// another.
__device__ inline bool claim(FaultCell& cell, uint32_t& number) {
  const uint32_t taken = *static_cast<volatile uint32_t*>(&cell.taken);
  number = taken + 1;
  return atomicCAS(&cell.claimed, taken, number) == taken;
}

// Lets the host read it.
__device__ inline void publish(FaultCell& cell, uint32_t number, const FaultDetails& details) {
  cell.details = details;
  __threadfence_system();
  *static_cast<volatile uint32_t*>(&cell.ready) = number;
}

// `entries` are concerned; the details describe one of them.
__device__ inline void report_fault(FaultSlot* slot, FaultKind kind, const FaultDetails& details,
                                    unsigned long long entries) {
  FaultCell& cell = slot->cells[static_cast<int>(kind)];
  atomicAdd(&cell.entries, entries);
  __threadfence_system();  // before it looks at `taken`: see Faults::take
  uint32_t number = 0;
  if (claim(cell, number)) publish(cell, number, details);
}

}  // namespace tiger_ext
