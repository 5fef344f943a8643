// SPDX-License-Identifier: Apache-2.0
//
// Storage types: how elements lie in memory, and how they become the arithmetic type and back.
// Arithmetic is float (double for float64 parameters) whatever is stored; narrowing rounds to
// nearest even. Branch-free integer arithmetic, so that the compiler vectorises the conversions on
// every instruction set and all of them give the same bits. No torch; host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/update_rules.h"

namespace tiger_ext {

enum class Storage : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8 };

constexpr int64_t storage_size(Storage s) {
  return s == Storage::kFloat64 ? 8 : s == Storage::kFloat32 ? 4 : s == Storage::kInt8 ? 1 : 2;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

TIGER_EXT_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
TIGER_EXT_INLINE float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

TIGER_EXT_INLINE float widen(BFloat16 h) { return bits_float(static_cast<uint32_t>(h.bits) << 16); }

TIGER_EXT_INLINE BFloat16 narrow_bfloat16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? 0x7FC0u | (u >> 16 & 0x8000u) : rounded)};
}

// Half precision has 5 exponent bits (bias 15) and 10 fraction bits; float 8 (bias 127) and 23.
TIGER_EXT_INLINE float widen(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7FFFu;
  // normal: shift the fraction into place and rebias; Inf and NaN: rebias twice, to 255
  const uint32_t rebias = magnitude >= 0x7C00u ? 2u * (112u << 23) : 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  // subnormal: 0.5 has an ulp of 2^-24, the weight of half's last bit
  const uint32_t subnormal = float_bits(bits_float(0x3F000000u | magnitude) - 0.5f);
  return bits_float(sign | (magnitude < 0x0400u ? subnormal : normal));
}

TIGER_EXT_INLINE Float16 narrow_float16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  const uint32_t rounded = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t normal = magnitude >= 0x47800000u ? 0x7C00u : rounded;  // 2^16 and above: Inf
  // below 2^-14 the addition to 0.5 rounds at half's last bit
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const bool nan = magnitude > 0x7F800000u;
  return {static_cast<uint16_t>(sign | (nan ? 0x7E00u : finite))};
}

// What decay alone does not take a state below: its storage would round it to 0, or a mode of the
// processor take it for 0.
template <typename T>
TIGER_EXT_INLINE T smallest_kept(Storage s) {
  return static_cast<T>(s == Storage::kFloat16                     ? 0x1p-24
                        : s == Storage::kFloat64 && sizeof(T) == 8 ? 0x1p-1022
                                                                   : 0x1p-126);
}

template <typename T>
TIGER_EXT_INLINE T load_element(float x) {
  return static_cast<T>(x);
}
template <typename T>
TIGER_EXT_INLINE T load_element(double x) {
  return static_cast<T>(x);
}
template <typename T>
TIGER_EXT_INLINE T load_element(BFloat16 x) {
  return static_cast<T>(widen(x));
}
template <typename T>
TIGER_EXT_INLINE T load_element(Float16 x) {
  return static_cast<T>(widen(x));
}

// Without its scale.
template <typename T>
TIGER_EXT_INLINE T load_element(int8_t x) {
  return static_cast<T>(x);
}

template <typename T>
TIGER_EXT_INLINE void store_element(float* p, T x) {
  *p = static_cast<float>(x);
}
template <typename T>
TIGER_EXT_INLINE void store_element(double* p, T x) {
  *p = static_cast<double>(x);
}
template <typename T>
TIGER_EXT_INLINE void store_element(BFloat16* p, T x) {
  *p = narrow_bfloat16(static_cast<float>(x));
}
template <typename T>
TIGER_EXT_INLINE void store_element(Float16* p, T x) {
  *p = narrow_float16(static_cast<float>(x));
}

}  // namespace tiger_ext
