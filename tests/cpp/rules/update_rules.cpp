// SPDX-License-Identifier: Apache-2.0
//
// The rules for one element, against their formulas in long double.
#include "rules/update_rules.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "../check.h"

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

template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

template <typename T>
void check_directions() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  CHECK((direction_of<Direction::kClip>(T(0.25), T(2)) == T(0.5)));
  CHECK((direction_of<Direction::kClip>(T(5), T(2)) == T(1)));
  CHECK((direction_of<Direction::kClip>(T(-5), T(2)) == T(-1)));
  CHECK((direction_of<Direction::kPower>(T(-9), T(0.5)) == T(-3)));
  CHECK((direction_of<Direction::kPower>(T(0), T(0.5)) == T(0)));
  CHECK(close(direction_of<Direction::kAtan>(T(1), T(1)), T(0.5), T(1e-6)));
  CHECK((std::isnan(direction_of<Direction::kSign>(nan, T(1)))));
  CHECK((std::isnan(direction_of<Direction::kClip>(nan, T(1)))));
  CHECK((std::isnan(direction_of<Direction::kPower>(nan, T(0.5)))));
  CHECK((std::isnan(direction_of<Direction::kAtan>(nan, T(1)))));
}

// k micro-steps: the momentum decays once, p moves once, and the gradient counts for its mean.
template <typename T>
void check_window(T tolerance) {
  RuleParams r;
  r.lr = 0.1, r.beta1 = r.beta2 = 0.75, r.weight_decay = 0.5;
  T p = 2, m = 1, plain_p = 2, plain_m = 1;
  SignMomentum<T>{r}(T(-4), plain_p, plain_m);

  r.micro_steps = 2, r.moves = false;
  Momentum<T> add(r);
  add.template update<Direction::kSign, false>(T(-3), p, m);
  CHECK(p == T(2));
  add.stop_decay();
  add.template update<Direction::kSign, false>(T(-5), p, m);
  CHECK(close(m, plain_m, tolerance));

  r.adds = r.decays = false, r.moves = true;
  const T before = m;
  Momentum<T>{r}.template update<Direction::kSign, true>(T(0), p, m);
  CHECK(same_bits(m, before));
  CHECK(same_bits(p, plain_p));
}

template <typename T>
void check_looks(T tolerance) {
  RuleParams r;
  r.lr = 0.1, r.weight_decay = 0.5;
  Momentum<T> rule(r);
  rule.scale({3.0, 1.0});
  CHECK(close(rule.lr, T(0.3), tolerance) && close(rule.decay, T(0.85), tolerance));
  T moved = 2, m = 1;  // the direction's factor is not the decay's
  r.direction = Direction::kClip, r.beta1 = r.beta2 = 1.0;
  Momentum<T> clipped(r);
  clipped.scale({3.0, 0.5});
  clipped.template update<Direction::kClip, true>(T(0), moved, m);
  CHECK(close(moved, T(2 * 0.85 - 0.3 * 0.5), tolerance));
  clipped.scale({1e30, 1.0});
  CHECK(clipped.decay == T(0));
  clipped.scale({1.7e308, 1.0});
  CHECK(clipped.lr <= largest<T>());
  r.direction = Direction::kPower, r.direction_scale = 2.0, r.scale = Scale::kTensor;
  const T least = -largest<T>();
  CHECK((Momentum<T>(r).template direction_for<Direction::kPower>(least) == least));
  r.scale = Scale::kNone;
  CHECK((Momentum<T>(r).template direction_for<Direction::kPower>(least) < least));
  r.direction = Direction::kSign;

  r.scale = Scale::kTensor, r.rms_floor = 0.5;
  Facts facts;
  facts.params = 4 * 9.0;
  CHECK((facts.rate(r, 4) == Rate{3.0, 1.0}));
  facts.params = 4 * 0.01;
  CHECK((facts.rate(r, 4) == Rate{0.5, 1.0}));  // the floor
  facts.params = 4 * 9.0, facts.directions = 4 * 4.0;
  CHECK((facts.rate(r, 4) == Rate{3.0, 1.0}));  // of a sign counts as 1
  r.direction = Direction::kClip;
  CHECK((facts.rate(r, 4) == Rate{3.0, 0.5}));
  facts.directions = 0.0;
  CHECK((facts.rate(r, 4) == Rate{3.0, 0x1p126}));  // the smallest that RMS(d) counts as
  facts.params = INFINITY;
  CHECK(facts.rate(r, 4).size < INFINITY);

  r.shrink_ratio = 0.5, r.shrink_to = 1.0;
  T p = 5;
  Shrink<T>{r}(T(0), p);
  CHECK(p == T(3));

  CHECK(judge(r, facts) == Verdict::kUpdate);
  facts.finite = false;
  CHECK(judge(r, facts) == Verdict::kUpdate);
  r.nonfinite = Nonfinite::kSkip;
  CHECK(judge(r, facts) == Verdict::kSkip);
  r.nonfinite = Nonfinite::kShrink;
  CHECK(judge(r, facts) == Verdict::kShrink);
  r.adds = false;
  CHECK(judge(r, facts) == Verdict::kUpdate);
}

}  // namespace

int main() {
  check_directions<float>();
  check_directions<double>();
  check_window<float>(1e-6f);
  check_window<double>(1e-14);
  check_looks<float>(1e-6f);
  check_looks<double>(1e-14);
  check_sign<float>();
  check_sign<double>();
  check_rules<float>(1e-6L);
  check_rules<double>(1e-14L);
  check_rest<float>();
  check_rest<double>();
  return failures != 0;
}
