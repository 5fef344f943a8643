// SPDX-License-Identifier: Apache-2.0
//
// The rules for one element, against their formulas in long double.
#include "update_rules.h"

#include <cmath>
#include <limits>
#include <random>

#include "check.h"

using namespace tiger_ext;

namespace {

bool close(long double a, long double b, long double tolerance) {
  return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

template <typename T>
void check_sign() {
  CHECK(sign(T(0)) == T(0));
  CHECK(sign(T(-0.0)) == T(0));
  CHECK(sign(std::numeric_limits<T>::denorm_min()) == T(1));
  CHECK(sign(-std::numeric_limits<T>::denorm_min()) == T(-1));
  CHECK(sign(std::numeric_limits<T>::infinity()) == T(1));
  CHECK(sign(-std::numeric_limits<T>::infinity()) == T(-1));
  CHECK(std::isnan(sign(std::numeric_limits<T>::quiet_NaN())));
}

template <typename T>
void check_rules(long double tolerance) {
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  for (int i = 0; i < 10000; ++i) {
    RuleParams r;
    r.lr = 0.01;
    r.weight_decay = 0.1;
    r.beta1 = i % 3 ? 0.9 : 0.965;
    r.beta2 = i % 3 ? 0.99 : 0.965;
    r.eps = 1e-8;
    r.grad_factor = i % 2 ? -1.0 : 0.25;
    r.bias_correction1 = 1 - std::pow(r.beta1, 1 + i % 50);
    r.bias_correction2 = 1 - std::pow(r.beta2, 1 + i % 50);
    const T grad = static_cast<T>(normal(random)), p0 = static_cast<T>(normal(random));
    const T m0 = static_cast<T>(normal(random)), v0 = static_cast<T>(std::fabs(normal(random)));
    const long double g = grad * static_cast<long double>(r.grad_factor);
    const long double decay = 1 - static_cast<long double>(r.lr) * r.weight_decay;

    T p = p0, m = m0, v = v0;
    SignMomentum<T>{r}(grad, p, m);
    const long double c = r.beta1 * static_cast<long double>(m0) + (1 - r.beta1) * g;
    CHECK(close(m, r.beta2 * static_cast<long double>(m0) + (1 - r.beta2) * g, tolerance));
    if (std::fabs(c) > 1e-5) CHECK(close(p, decay * p0 - r.lr * (c > 0 ? 1 : -1), tolerance));

    p = p0, m = m0;
    AdamW<T>{r}(grad, p, m, v);
    const long double em = r.beta1 * static_cast<long double>(m0) + (1 - r.beta1) * g;
    const long double ev = r.beta2 * static_cast<long double>(v0) + (1 - r.beta2) * g * g;
    CHECK(close(m, em, tolerance));
    CHECK(close(v, ev, tolerance));
    CHECK(close(p,
                decay * p0 -
                    r.lr * (em / r.bias_correction1) / (std::sqrt(ev / r.bias_correction2) + r.eps),
                tolerance));

    p = p0, v = v0;
    r.beta1 = 0, r.bias_correction1 = 1;
    AdamWWithoutMoment1<T>{r}(grad, p, v);
    CHECK(
        close(p, decay * p0 - r.lr * g / (std::sqrt(ev / r.bias_correction2) + r.eps), tolerance));
  }
}

// Nothing moves without gradient, momentum and decay, whatever the sign of zero.
template <typename T>
void check_rest() {
  RuleParams r;
  r.lr = 0.1;
  r.beta1 = r.beta2 = 0.965;
  r.grad_factor = -1;
  for (T start : {T(0), T(3), T(-1e-30)}) {
    T p = start, m = 0;
    SignMomentum<T>{r}(T(0), p, m);
    CHECK(p == start && m == T(0));
  }
}

}  // namespace

int main() {
  check_sign<float>();
  check_sign<double>();
  check_rules<float>(1e-6L);
  check_rules<double>(1e-14L);
  check_rest<float>();
  check_rest<double>();
  return failures != 0;
}
