// SPDX-License-Identifier: Apache-2.0
//
// How the processor computes with floating point numbers is a mode of each thread:
// torch.set_flush_denormal(True) lets the calling one take subnormal numbers for zero, and perhaps
// those of the pool, by when they were started. Results must not depend on it.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <cstdint>

namespace tiger_ext {

// While it lives, this thread computes as IEEE 754 says: nothing is flushed, to nearest even.
class FloatMode {
 public:
  FloatMode() : before_(get()) {
    if (before_ & kChanges) set(before_ & ~kChanges);
  }
  ~FloatMode() {
    if (before_ & kChanges) set(before_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__x86_64__)
  using Bits = unsigned;
  static constexpr Bits kChanges = 0x8000 | 0x6000 | 0x0040;  // flush, rounding, inputs are zero
  static Bits get() { return _mm_getcsr(); }
  static void set(Bits bits) { _mm_setcsr(bits); }
#elif defined(__aarch64__)
  using Bits = uint64_t;
  static constexpr Bits kChanges = Bits{1} << 24 | Bits{3} << 22;  // flush, rounding
  static Bits get() {
    Bits bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits) : : "memory");
    return bits;
  }
  static void set(Bits bits) { asm volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#else
  using Bits = unsigned;
  static constexpr Bits kChanges = 0;
  static Bits get() { return 0; }
  static void set(Bits) {}
#endif

  const Bits before_;
};

}  // namespace tiger_ext
