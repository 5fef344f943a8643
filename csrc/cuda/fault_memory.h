// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "step/faults.h"

namespace tiger_ext {

// Memory for one optimizer's faults on one device, zeroed, in which its kernels and the host see
// each other's writes. It is given back to a pool, and by it to another optimizer once all kernels
// that may write there have run, those of captured graphs never. Fails with std::runtime_error
// where there is no such memory.
std::shared_ptr<FaultSlot> make_fault_memory();

// Kernels that may write to a slot are launched on a stream, of the current device, while it lives.
class FaultMemoryUse {
 public:
  FaultMemoryUse(FaultSlot* slot, cudaStream_t stream) : slot_(slot), stream_(stream) {}
  ~FaultMemoryUse();
  FaultMemoryUse(const FaultMemoryUse&) = delete;
  FaultMemoryUse& operator=(const FaultMemoryUse&) = delete;

 private:
  FaultSlot* slot_;
  cudaStream_t stream_;
};

// A zeroed word of such memory. It is never given back: kernels write to it at every step, and
// whoever had it next would read what belongs to another.
uint64_t* make_note_memory();

}  // namespace tiger_ext
