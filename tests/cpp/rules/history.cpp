// SPDX-License-Identifier: Apache-2.0
//
// What skipped steps do, in closed form, against one step after the other in long double.
#include "rules/history.h"

#include <cmath>
#include <random>
#include <vector>

#include "../check.h"

using namespace tiger_ext;

namespace {

struct Setting {
  double lr, weight_decay, beta1, beta2;
};

struct Affine {
  long double decay = 1, drift = 0, log_beta1 = 0, log_beta2 = 0;
};

Affine one_by_one(const std::vector<Setting>& steps, int64_t from, int64_t to) {
  Affine a;
  for (int64_t i = from; i < to; ++i) {
    const Setting& s = steps[static_cast<size_t>(i)];
    const long double factor =
        1.0L - static_cast<long double>(s.lr) * static_cast<long double>(s.weight_decay);
    a.decay *= factor;
    a.drift = factor * a.drift + static_cast<long double>(s.lr);
    a.log_beta1 += std::log(static_cast<long double>(s.beta1));
    a.log_beta2 += std::log(static_cast<long double>(s.beta2));
  }
  return a;
}

bool close(double a, long double b, long double tolerance) {
  return std::fabs(static_cast<long double>(a) - b) <= tolerance * std::fabs(b);
}

void check(const std::vector<Setting>& steps, long double tolerance) {
  std::vector<Stretch> stretches(steps.size() + 1);
  int64_t count = 0;
  for (size_t i = 0; i < steps.size(); ++i)
    count = append_step(stretches.data(), count, static_cast<int64_t>(i) + 1, steps[i].lr,
                        steps[i].weight_decay, steps[i].beta1, steps[i].beta2);
  std::mt19937_64 random(3);
  const int64_t last = static_cast<int64_t>(steps.size());
  for (int trial = 0; trial < 300; ++trial) {
    int64_t from = static_cast<int64_t>(random() % steps.size());
    if (trial % 3 == 0) from = last - 1 - static_cast<int64_t>(random() % 20);
    if (trial == 1) from = 0;
    const int64_t to =
        trial % 5 ? last : from + 1 + static_cast<int64_t>(random() % uint64_t(last - from));
    const SkippedSteps s = skipped_steps(stretches.data(), count, from, to);
    const Affine a = one_by_one(steps, from, to);
    CHECK(close(std::exp(s.log_decay), a.decay, tolerance));
    CHECK(close(s.drift, a.drift, tolerance));
    CHECK(close(s.log_beta1, a.log_beta1, tolerance));
    CHECK(close(s.log_beta2, a.log_beta2, tolerance));
    CHECK(!s.zero_beta1 && !s.zero_beta2);
  }
}

}  // namespace

int main() {
  std::vector<Setting> constant(3000, {1e-2, 0.1, 0.9, 0.99});
  check(constant, 1e-13L);

  std::vector<Setting> none(3000, {1e-2, 0.0, 0.9, 0.99});
  check(none, 1e-13L);

  std::vector<Setting> cosine;
  for (int i = 0; i < 20000; ++i)
    cosine.push_back({1e-3 * (1.001 + std::cos(i / 3000.0)), 0.1, 0.965, 0.965});
  check(cosine, 1e-13L);

  std::vector<Setting> mixed;
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform;
  for (int i = 0; i < 20000; ++i) {
    if (i == 0 || random() % 7 == 0)
      mixed.push_back({random() % 5 ? 1e-2 * uniform(random) : 0.0,
                       random() % 4 ? uniform(random) : 0.0, 0.5 + 0.4 * uniform(random),
                       0.9 + 0.09 * uniform(random)});
    else mixed.push_back(mixed.back());
  }
  check(mixed, 1e-12L);

  // Constant hyperparameters take no memory, and neither they nor a change after 1e8 steps lose
  // digits.
  Stretch stretches[3];
  int64_t count = append_step(stretches, 0, 1, 1e-3, 0.01, 0.9, 0.99);
  CHECK(append_step(stretches, count, 100000000, 1e-3, 0.01, 0.9, 0.99) == 1);
  count = append_step(stretches, count, 100000001, 2e-3, 0.01, 0.9, 0.99);
  CHECK(count == 2);
  const SkippedSteps s = skipped_steps(stretches, count, 99999990, 100000010);
  const long double a1 = std::pow(1.0L - 1e-5L, 10), a2 = std::pow(1.0L - 2e-5L, 10);
  CHECK(close(std::exp(s.log_decay), a1 * a2, 1e-13L));
  CHECK(close(s.drift, 100.0L * (1.0L - a2) + a2 * 100.0L * (1.0L - a1), 1e-11L));
  CHECK(close(skipped_steps(stretches, count, 0, 100000000).drift, 100.0L, 1e-13L));

  // A beta of 0 in one of the steps.
  count = append_step(stretches, count, 100000020, 2e-3, 0.01, 0.9, 0.0);
  CHECK(count == 3);
  CHECK(skipped_steps(stretches, count, 100000000, 100000020).zero_beta2);
  CHECK(!skipped_steps(stretches, count, 100000000, 100000019).zero_beta2);
  CHECK(!skipped_steps(stretches, count, 100000000, 100000020).zero_beta1);
  CHECK(skipped_steps(stretches, count, 100000020, 100000020).log_decay == 0.0);
  return failures != 0;
}
