// SPDX-License-Identifier: Apache-2.0
#include "cuda/fault_memory.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace tiger_ext {
namespace {

constexpr int kPerAllocation = 64;

// Which kernels may still write to a slot.
struct Writers {
  std::unordered_map<cudaStream_t, cudaEvent_t> last;  // of each stream
  bool forever = false;  // a captured graph may be replayed at any time; or there was no telling
};

struct Pool {
  std::mutex mutex;
  std::vector<FaultSlot*> free;
  std::vector<FaultSlot*> retired;  // without an owner, but perhaps with writers
  std::unordered_map<FaultSlot*, Writers> writers;
};

Pool& pool() {
  static auto* const p = new Pool();  // outlives every optimizer
  return *p;
}

// What is done here is no part of any captured graph and must not spoil one.
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

// Notes the work that a stream has been given; returns whether that was possible.
bool note(Writers& writers, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess ||
      status != cudaStreamCaptureStatusNone)
    return false;
  const auto [at, added] = writers.last.try_emplace(stream);
  if (added && cudaEventCreateWithFlags(&at->second, cudaEventDisableTiming) != cudaSuccess) {
    writers.last.erase(at);
    return false;
  }
  return cudaEventRecord(at->second, stream) == cudaSuccess;
}

// Whether all have run; then they are forgotten. Does not wait.
bool gone(Writers& writers) {
  for (auto at = writers.last.begin(); at != writers.last.end();) {
    if (cudaEventQuery(at->second) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    cudaEventDestroy(at->second);
    at = writers.last.erase(at);
  }
  return true;
}

// Moves to `free` what nobody writes to any more.
void collect(Pool& p) {
  const RelaxedCapture relaxed;
  const auto still = std::partition(p.retired.begin(), p.retired.end(), [&](FaultSlot* slot) {
    const auto found = p.writers.find(slot);
    if (found == p.writers.end()) return false;
    if (!gone(found->second)) return true;
    p.writers.erase(found);
    return false;
  });
  p.free.insert(p.free.end(), still, p.retired.end());
  p.retired.erase(still, p.retired.end());
}

void retire(FaultSlot* slot) {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  const auto found = p.writers.find(slot);
  if (found != p.writers.end() && found->second.forever) p.writers.erase(found);
  else p.retired.push_back(slot);
}

}  // namespace

std::shared_ptr<FaultSlot> make_fault_memory() {
  Pool& p = pool();
  FaultSlot* slot = nullptr;
  {
    const std::lock_guard lock(p.mutex);
    if (p.free.empty()) collect(p);
    if (p.free.empty()) {
      auto* const memory = static_cast<FaultSlot*>(allocate(kPerAllocation * sizeof(FaultSlot)));
      for (int k = 0; k < kPerAllocation; ++k) p.free.push_back(memory + k);
    }
    slot = p.free.back();
    p.free.pop_back();
  }
  *slot = {};
  return {slot, retire};
}

FaultMemoryUse::~FaultMemoryUse() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  Writers& writers = p.writers[slot_];
  if (writers.forever) return;
  const RelaxedCapture relaxed;
  if (note(writers, stream_)) return;
  cudaGetLastError();
  writers.forever = true;
  for (const auto& [stream, event] : writers.last) cudaEventDestroy(event);
  writers.last.clear();
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
