// SPDX-License-Identifier: Apache-2.0
//
// The storage conversions against their definition by value, exhaustively where that is possible.
#include "rules/storage.h"

#include <cmath>
#include <limits>
#include <random>

#include "../check.h"

using namespace tiger_ext;

namespace {

// The value of a 16-bit float with `exponent_bits`, by its definition.
double value_of(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7FFF) >> fraction_bits;
  const double fraction = (bits & ((1 << fraction_bits) - 1)) / std::ldexp(1.0, fraction_bits);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1)
    return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, exponent - bias);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <typename Narrow>
void check_rounding(float x, int exponent_bits, Narrow narrow) {
  const uint16_t got = narrow(x);
  const double value = value_of(got, exponent_bits);
  if (std::isnan(x)) {
    CHECK(std::isnan(value));
    return;
  }
  CHECK(std::signbit(value) == std::signbit(x));
  // Nearest: no neighbour is closer, and of two equally close the even one. The neighbour beyond
  // the largest finite number counts as the power of two it would be.
  const int top = ((1 << exponent_bits) - 1) << (15 - exponent_bits);
  const auto magnitude = [&](int bits) {
    return bits >= top ? std::ldexp(1.0, 1 << (exponent_bits - 1))
                       : std::fabs(value_of(static_cast<uint16_t>(bits), exponent_bits));
  };
  const int bits = got & 0x7FFF;
  CHECK(bits <= top);
  if (std::isinf(x)) {
    CHECK(bits == top);
    return;
  }
  const double target = std::fabs(static_cast<double>(x));
  const double error = std::fabs(magnitude(bits) - target);
  for (int neighbour : {bits - 1, bits + 1}) {
    if (neighbour < 0 || neighbour > top) continue;
    const double other = std::fabs(magnitude(neighbour) - target);
    if (bits == top && target >= magnitude(top)) continue;
    CHECK(error < other || (error == other && bits % 2 == 0));
  }
}

void check_float(float x) {
  check_rounding(x, 8, [](float v) { return narrow_bfloat16(v).bits; });
  check_rounding(x, 5, [](float v) { return narrow_float16(v).bits; });
}

}  // namespace

int main() {
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    CHECK(same(widen(BFloat16{bits}), value_of(bits, 8)));
    CHECK(same(widen(Float16{bits}), value_of(bits, 5)));
    if (!std::isnan(value_of(bits, 8))) CHECK(narrow_bfloat16(widen(BFloat16{bits})).bits == bits);
    if (!std::isnan(value_of(bits, 5))) CHECK(narrow_float16(widen(Float16{bits})).bits == bits);
    // halfway to the next number, and one float to either side
    for (int exponent_bits : {8, 5}) {
      const double here = value_of(bits, exponent_bits);
      const double next = value_of(static_cast<uint16_t>(bits + 1), exponent_bits);
      if (!std::isfinite(here) || !std::isfinite(next)) continue;
      const float middle = static_cast<float>((here + next) / 2);
      check_float(middle);
      check_float(std::nextafterf(middle, INFINITY));
      check_float(std::nextafterf(middle, -INFINITY));
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) check_float(bits_float(random()));
  for (float x : {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 65519.0f, 65520.0f, 3.4e38f})
    check_float(x);
  return failures != 0;
}
