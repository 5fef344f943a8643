// SPDX-License-Identifier: Apache-2.0
//
// Scratch memory of a step, handed from step to step so that its pages stay warm. Between steps a
// thread keeps at most kKeptBytes; what a larger step needed is given back to the system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace tiger_ext {

class Scratch {
 public:
  static constexpr size_t kKeptBytes = size_t{64} << 20;

  Scratch() : buffers_(std::move(kept())) { kept() = Buffers(); }
  ~Scratch() {
    if (bytes_of(buffers_) <= kKeptBytes && bytes_of(buffers_) > bytes_of(kept()))
      kept() = std::move(buffers_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Uninitialised memory of at least `bytes`, aligned to a cache line. Each slot holds one buffer,
  // valid until the slot is asked for again.
  enum Slot { kKeys, kOtherKeys, kCounts, kPieces, kSlots };

  template <typename T>
  T* get(Slot slot, size_t count) {
    Buffer& b = buffers_.slots[slot];
    const size_t bytes = count * sizeof(T);
    if (b.bytes < bytes) {
      b = Buffer();  // free before allocating
      b.data.reset(new (std::align_val_t(kAlignment)) std::byte[bytes]);
      b.bytes = bytes;
    }
    return reinterpret_cast<T*>(b.data.get());
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(std::byte* p) const { operator delete[](p, std::align_val_t(kAlignment)); }
  };
  struct Buffer {
    std::unique_ptr<std::byte[], Free> data;
    size_t bytes = 0;
  };
  struct Buffers {
    Buffer slots[kSlots];
  };

  static size_t bytes_of(const Buffers& b) {
    size_t total = 0;
    for (const Buffer& s : b.slots) total += s.bytes;
    return total;
  }
  static Buffers& kept() {
    thread_local Buffers buffers;
    return buffers;
  }

  Buffers buffers_;
};

}  // namespace tiger_ext
