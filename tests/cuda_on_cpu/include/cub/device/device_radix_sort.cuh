// SPDX-License-Identifier: Apache-2.0
//
// Stands in for CUB's radix sort. What CUB leaves open is left to chance: the buffer that holds the
// result. What it may overwrite is overwritten: the other buffer and all of the scratch memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

namespace cub {

template <typename T>
struct DoubleBuffer {
  T* d_buffers[2] = {nullptr, nullptr};
  int selector = 0;

  DoubleBuffer() = default;
  DoubleBuffer(T* current, T* alternate) : d_buffers{current, alternate} {}
  T* Current() { return d_buffers[selector]; }
  T* Alternate() { return d_buffers[selector ^ 1]; }
};

struct DeviceRadixSort {
  template <typename Key, typename NumItems>
  static cudaError_t SortKeys(void* temp, size_t& temp_bytes, DoubleBuffer<Key>& keys, NumItems n,
                              int begin_bit = 0, int end_bit = sizeof(Key) * 8,
                              cudaStream_t = nullptr) {
    static_assert(std::is_unsigned_v<Key> && sizeof(Key) >= sizeof(unsigned));
    const size_t count = static_cast<size_t>(n), needed = 1024 + count / 8;
    if (temp == nullptr) {
      temp_bytes = needed;
      return cudaSuccess;
    }
    constexpr int kBits = sizeof(Key) * 8;
    if (temp_bytes < needed || begin_bit < 0 || begin_bit > end_bit || end_bit > kBits)
      return cudaErrorInvalidValue;

    const auto lock = cuda_on_cpu::start_launch();
    cuda_on_cpu::scribble(temp, temp_bytes);
    if (begin_bit < end_bit) {
      const int above = kBits - end_bit;
      const auto digits = [&](Key key) { return key << above >> (above + begin_bit); };
      std::stable_sort(keys.Current(), keys.Current() + count,
                       [&](Key a, Key b) { return digits(a) < digits(b); });
    }
    if (cuda_on_cpu::random() & 1) {
      std::copy_n(keys.Current(), count, keys.Alternate());
      keys.selector ^= 1;
    }
    cuda_on_cpu::scribble(keys.Alternate(), count * sizeof(Key));
    return cudaSuccess;
  }
};

}  // namespace cub
