// SPDX-License-Identifier: Apache-2.0
//
// Work on many tensors in few launches. Knows nothing of optimizers: an Item describes one tensor's
// work, a functor does block b of it, and the items travel in the kernel's parameters, so nothing
// is copied to the device beforehand and a captured launch carries all it needs.
//
// Every kernel of the project is launched here.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace tiger_ext {

// Threads of every block.
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("tiger_ext: ") + what + ": " + cudaGetErrorString(status));
}

// 32 KB of kernel parameters need compute capability 7.0 and CUDA 12.1.
constexpr bool has_large_parameters() {
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};
  for (int a : architectures)
    if (a < 700) return false;
  return CUDART_VERSION >= 12010;
}
constexpr size_t kParameterBytes = has_large_parameters() ? 32764 : 4096;

template <typename Functor>
constexpr int batch_capacity() {
  constexpr size_t fixed = 64 + sizeof(Functor);  // the count, the functor, alignment
  return static_cast<int>((kParameterBytes - fixed) /
                          (sizeof(typename Functor::Item) + sizeof(uint32_t)));
}

template <typename Functor>
struct Batch {
  static constexpr int kCapacity = batch_capacity<Functor>();
  static_assert(kCapacity >= 1);

  int count;
  uint32_t first_block[kCapacity];
  typename Functor::Item items[kCapacity];

  // The item to which a block of the grid belongs.
  __device__ int find(uint32_t block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_block[middle] <= block) low = middle;
      else high = middle;
    }
    return low;
  }
};

template <typename Functor>
__global__ void __launch_bounds__(kThreads, Functor::kMinBlocks)
    multi_tensor_kernel(const Batch<Functor> __grid_constant__ batch, const Functor functor) {
  const int k = batch.find(blockIdx.x);
  functor(batch.items[k], blockIdx.x - batch.first_block[k]);
}

// The block's shared memory. (A reference to one array for all kernels, because an `extern` array
// cannot have a different type in each.)
template <typename T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ unsigned char tiger_ext_shared_memory[];
  return *reinterpret_cast<T*>(tiger_ext_shared_memory);
}

// Runs functor(item, block) for block in [0, functor.blocks(item)) of every item, each on a block
// of kThreads threads that share functor.kSharedBytes bytes. functor.kMinBlocks blocks at least are
// to fit a multiprocessor at a time, which limits the registers of a thread.
template <typename Functor>
void multi_tensor_apply(const std::vector<typename Functor::Item>& items, const Functor& functor,
                        cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  Batch<Functor> batch;
  batch.count = 0;
  int64_t blocks = 0;
  const auto launch = [&] {
    if (batch.count == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = Functor::kSharedBytes;
    config.stream = stream;
    check_cuda(cudaLaunchKernelEx(&config, multi_tensor_kernel<Functor>, batch, functor),
               "launching a kernel");
    batch.count = 0;
    blocks = 0;
  };
  for (const auto& item : items) {
    const int64_t n = functor.blocks(item);
    if (n == 0) continue;
    if (n > kMaxBlocks) throw std::length_error("tiger_ext: a tensor is too large for one launch");
    if (batch.count == Batch<Functor>::kCapacity || blocks + n > kMaxBlocks) launch();
    batch.first_block[batch.count] = static_cast<uint32_t>(blocks);
    batch.items[batch.count++] = item;
    blocks += n;
  }
  launch();
}

}  // namespace tiger_ext
