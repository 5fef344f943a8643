// SPDX-License-Identifier: Apache-2.0
#include "cuda/fault_memory.h"

#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace tiger_ext {
namespace {

constexpr int kPerAllocation = 64;

struct Pool {
  std::mutex mutex;
  std::vector<RowFault*> free;
};

Pool& pool() {
  static auto* const p = new Pool();  // outlives every optimizer
  return *p;
}

// Allocating host memory is no part of any captured graph and must not spoil one.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

void* allocate(size_t bytes) {
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  const cudaError_t status =
      cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (status == cudaSuccess) return memory;
  cudaGetLastError();  // reported here, so that no later call reports it
  throw std::runtime_error(std::string("tiger_ext: allocating host memory for CUDA: ") +
                           cudaGetErrorString(status));
}

}  // namespace

std::shared_ptr<RowFault> make_fault_memory() {
  const std::lock_guard lock(pool().mutex);
  if (pool().free.empty()) {
    auto* const memory = static_cast<RowFault*>(allocate(kPerAllocation * sizeof(RowFault)));
    for (int k = 0; k < kPerAllocation; ++k) pool().free.push_back(memory + k);
  }
  RowFault* const fault = pool().free.back();
  pool().free.pop_back();
  *fault = {};
  return {fault, [](RowFault* f) {
            const std::lock_guard lock(pool().mutex);
            pool().free.push_back(f);
          }};
}

uint64_t* make_note_memory() {
  static uint64_t* next = nullptr;
  static int left = 0;
  const std::lock_guard lock(pool().mutex);
  if (left == 0) {
    constexpr int kNotes = 512;
    next = static_cast<uint64_t*>(allocate(kNotes * sizeof(uint64_t)));
    left = kNotes;
  }
  --left;
  *next = 0;
  return next++;
}

}  // namespace tiger_ext
