// SPDX-License-Identifier: Apache-2.0
//
// Stochastic rounding: a number goes to one of its two neighbours, the nearer one more often, so
// that its mean is kept. The random bits come from a counter: they depend on the seed, the step,
// the tensor and the element alone, not on threads or devices. No torch; host and device.
#pragma once

#include <cstdint>

#include "rules/storage.h"

namespace tiger_ext {

// So many elements in memory order make a unit of rounding where an update does not go by rows,
// and have one scale where the momentum is stored in int8.
constexpr int64_t kRoundingBlock = 256;

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// The finalizer of splitmix64 (Steele, Lea, Flood 2014).
TIGER_EXT_INLINE uint64_t mix_bits(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9;
  x ^= x >> 27;
  x *= 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// What is rounded. The catch-up alone, without an update, has bits of its own.
enum class RoundedStream : uint64_t { kParam = 0, kMomentum = 1, kParamCaughtUp = 2 };

// The key of one tensor in one step. `position` is the parameter's number in the optimizer.
TIGER_EXT_INLINE uint64_t rounding_key(uint64_t seed, RoundedStream stream, int64_t step,
                                       int64_t position) {
  const uint64_t s = mix_bits(seed + kGolden * static_cast<uint64_t>(stream));
  const uint64_t t = mix_bits(s + kGolden * static_cast<uint64_t>(step));
  return mix_bits(t + kGolden * static_cast<uint64_t>(position));
}

// The random bits of one unit: a row, or a block of kRoundingBlock elements.
struct RandomUnit {
  uint32_t low, high;

  TIGER_EXT_INLINE RandomUnit(uint64_t key, int64_t unit) {
    const uint64_t bits = mix_bits(key + kGolden * static_cast<uint64_t>(unit));
    low = static_cast<uint32_t>(bits);
    high = static_cast<uint32_t>(bits >> 32);
  }

  // 16 bits for element c.
  TIGER_EXT_INLINE uint32_t operator()(uint32_t c) const {
    const uint32_t both = of_pair(c / 2);
    return c % 2 ? both >> 16 : both & 0xFFFFu;
  }

  static constexpr uint32_t kStep = 0x9E3779B9u;
  // 32 bits, the lower half for element 2k, the upper one for 2k + 1.
  TIGER_EXT_INLINE uint32_t of_pair(uint32_t k) const {
    uint32_t x = low + k * kStep;
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= high;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
  }
};

// `random`: 16 bits.
TIGER_EXT_INLINE BFloat16 round_bfloat16(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? u >> 16 | 0x0040u : (u + random) >> 16)};
}

TIGER_EXT_INLINE Float16 round_float16(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  const uint32_t draw = random >> 3;
  const uint32_t rounded = (magnitude - (112u << 23) + draw) >> 13;
  const uint32_t normal = rounded >= 0x7C00u || magnitude >= 0x47800000u ? 0x7C00u : rounded;
  // In units of half's last bit; 13 random bits and those of the number's 10 fit a float.
  const float units = bits_float(magnitude) * 0x1p24f;
  const float added = units + (static_cast<float>(static_cast<int32_t>(draw)) + 0.5f) * 0x1p-13f;
  const bool small = magnitude < 0x38800000u;  // below 2^-14
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(small ? added : 0.0f));
  const bool nan = magnitude > 0x7F800000u;
  return {static_cast<uint16_t>(sign | (nan ? 0x7E00u : small ? subnormal : normal))};
}

template <typename Half>
TIGER_EXT_INLINE Half rounded_to(float x, uint32_t random);
template <>
TIGER_EXT_INLINE BFloat16 rounded_to<BFloat16>(float x, uint32_t random) {
  return round_bfloat16(x, random);
}
template <>
TIGER_EXT_INLINE Float16 rounded_to<Float16>(float x, uint32_t random) {
  return round_float16(x, random);
}

// int8: a unit's numbers are q * scale, q from -127 to 127.

// The scale of a unit whose largest magnitude has these bits. One that is not finite makes all of
// the unit NaN: it must not be hidden.
TIGER_EXT_INLINE float quantisation_scale(uint32_t largest_bits) {
  if (largest_bits >= 0x7F800000u) return bits_float(0x7FC00000u);
  const float scale = bits_float(largest_bits) / 127.0f;
  return largest_bits == 0 ? 0.0f : scale < 0x1p-126f ? 0x1p-126f : scale;
}

// `inverse`: 1 / scale, 0 where the scale is 0 or NaN.
TIGER_EXT_INLINE int32_t quantised(float x, float inverse, uint32_t random) {
  const float y =
      x * inverse + (static_cast<float>(static_cast<int32_t>(random)) + 0.5f) * 0x1p-16f;
  const int32_t whole = static_cast<int32_t>(y);
  const int32_t below = whole - (static_cast<float>(whole) > y ? 1 : 0);
  return below > 127 ? 127 : below < -127 ? -127 : below;
}

}  // namespace tiger_ext
