// SPDX-License-Identifier: Apache-2.0
//
// What a row's skipped steps would have done to it, however many they are, in O(1).
//
// With a zero gradient the sign s of the momentum m stays what it is, so that one step is an affine
// map of the parameter p, and so are many in a row:
//     p -> (1 - lr wd) p - lr s        p -> A p - B s,   m -> P m
//     A = prod (1 - lr_i wd_i)         B = sum_i lr_i prod_{j > i} (1 - lr_j wd_j)
// The history of a parameter group is a list of stretches, each of steps with the same
// hyperparameters. Within a stretch A, B and P have a closed form; across stretches they come from
// sums over all steps since the first: L = sum log(1 - lr wd), and D, the B of all steps, with
//     A(from, to) = exp(L_to - L_from),  B(from, to) = D_to - A(from, to) D_from
// Neither L nor D overflows (D <= max 1/wd), and both are kept in two doubles each, so that the
// differences are as exact after 1e8 steps as after one. No torch; host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "rules/update_rules.h"

namespace tiger_ext {

// An unevaluated sum of two doubles.
struct TwoDoubles {
  double high = 0.0;
  double low = 0.0;

  TIGER_EXT_INLINE void add(double x) {
    const double sum = high + x;
    const double part = sum - high;
    low += (high - (sum - part)) + (x - part);
    high = sum + low;
    low -= high - sum;
  }
  TIGER_EXT_INLINE double minus(const TwoDoubles& other) const {
    return (high - other.high) + (low - other.low);
  }
};

// The effect of some steps without a gradient.
struct SkippedSteps {
  double log_decay = 0.0;  // log A
  double drift = 0.0;      // B
  double log_beta1 = 0.0, log_beta2 = 0.0;
  bool zero_beta1 = false, zero_beta2 = false;  // a beta was 0: so is P

  // The effect of these steps, then of `later` ones.
  TIGER_EXT_INLINE SkippedSteps then(const SkippedSteps& later) const {
    SkippedSteps all;
    all.log_decay = log_decay + later.log_decay;
    all.drift = later.drift + std::exp(later.log_decay) * drift;
    all.log_beta1 = log_beta1 + later.log_beta1;
    all.log_beta2 = log_beta2 + later.log_beta2;
    all.zero_beta1 = zero_beta1 || later.zero_beta1;
    all.zero_beta2 = zero_beta2 || later.zero_beta2;
    return all;
  }
};

// Steps first, first + 1, ... up to the next stretch, and sums over all steps before.
struct Stretch {
  int64_t first = 1;
  double lr = 0.0, weight_decay = 0.0, beta1 = 0.0, beta2 = 0.0;
  TwoDoubles log_decay, drift, log_beta1, log_beta2;
  int64_t zeros1 = 0, zeros2 = 0;  // steps whose beta was 0, which the logarithms leave out

  TIGER_EXT_INLINE bool same(double other_lr, double other_weight_decay, double other_beta1,
                             double other_beta2) const {
    return lr == other_lr && weight_decay == other_weight_decay && beta1 == other_beta1 &&
           beta2 == other_beta2;
  }

  // The effect of `steps` steps of this stretch.
  TIGER_EXT_INLINE SkippedSteps of(int64_t steps) const {
    SkippedSteps e;
    const double n = static_cast<double>(steps);
    const double rate = lr * weight_decay;
    e.log_decay = n * std::log1p(-rate);
    e.drift = rate == 0.0 ? n * lr : -std::expm1(e.log_decay) / weight_decay;
    e.zero_beta1 = beta1 == 0.0 && steps > 0;
    e.zero_beta2 = beta2 == 0.0 && steps > 0;
    if (beta1 != 0.0) e.log_beta1 = n * std::log(beta1);
    if (beta2 != 0.0) e.log_beta2 = n * std::log(beta2);
    return e;
  }

  // The stretch that follows this one from step `next` on; without its hyperparameters.
  TIGER_EXT_INLINE Stretch next(int64_t step) const {
    const SkippedSteps e = of(step - first);
    Stretch s = *this;
    s.first = step;
    s.log_decay.add(e.log_decay);
    s.drift.add(e.drift + std::expm1(e.log_decay) * drift.high);
    s.log_beta1.add(e.log_beta1);
    s.log_beta2.add(e.log_beta2);
    if (e.zero_beta1) s.zeros1 += step - first;
    if (e.zero_beta2) s.zeros2 += step - first;
    return s;
  }

  // The effect of the steps from this stretch's first up to the one before `end`'s first.
  TIGER_EXT_INLINE SkippedSteps until(const Stretch& end) const {
    SkippedSteps e;
    e.log_decay = end.log_decay.minus(log_decay);
    e.drift = end.drift.minus(drift) - std::expm1(e.log_decay) * drift.high;
    e.log_beta1 = end.log_beta1.minus(log_beta1);
    e.log_beta2 = end.log_beta2.minus(log_beta2);
    e.zero_beta1 = end.zeros1 > zeros1;
    e.zero_beta2 = end.zeros2 > zeros2;
    return e;
  }
};

// Appends a step, the number `step`, to `count` stretches; returns how many there are then.
TIGER_EXT_INLINE int64_t append_step(Stretch* stretches, int64_t count, int64_t step, double lr,
                                     double weight_decay, double beta1, double beta2) {
  if (count > 0 && stretches[count - 1].same(lr, weight_decay, beta1, beta2)) return count;
  Stretch s = count > 0 ? stretches[count - 1].next(step) : Stretch{};
  s.first = step;
  s.lr = lr;
  s.weight_decay = weight_decay;
  s.beta1 = beta1;
  s.beta2 = beta2;
  stretches[count] = s;
  return count + 1;
}

// The last of the stretches [low, high) that starts at or before `step`.
TIGER_EXT_INLINE int64_t find_stretch(const Stretch* stretches, int64_t low, int64_t high,
                                      int64_t step) {
  if (stretches[high - 1].first <= step) return high - 1;  // where the present is looked for
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (stretches[middle].first <= step) low = middle;
    else high = middle;
  }
  return low;
}

// The effect of steps from + 1, ..., to (at most the last one appended).
TIGER_EXT_INLINE SkippedSteps skipped_steps(const Stretch* stretches, int64_t count, int64_t from,
                                            int64_t to) {
  if (from >= to || count == 0) return {};
  const int64_t last = find_stretch(stretches, 0, count, to);
  // The best guess for a schedule that changes at every step.
  int64_t low = last - (to - from - 1);
  if (low < 0) low = 0;
  const int64_t first = find_stretch(stretches, low, last + 1, from + 1);
  if (first == last) return stretches[last].of(to - from);
  const Stretch& after = stretches[first + 1];
  return stretches[first]
      .of(after.first - from - 1)
      .then(after.until(stretches[last]))
      .then(stretches[last].of(to - stretches[last].first + 1));
}

// A, B and the P of both betas.
struct Missed {
  double decay, drift, beta1, beta2;
};

// P is 0 only where a beta was. `both`: whether the first beta's is wanted.
TIGER_EXT_INLINE Missed missed(const SkippedSteps& s, bool both) {
  const double least = 0x1p-1022;
  const double p1 = both ? std::exp(s.log_beta1) : 1.0, p2 = std::exp(s.log_beta2);
  return {std::exp(s.log_decay), s.drift,
          s.zero_beta1 ? 0.0
          : p1 < least ? least
                       : p1,
          s.zero_beta2 ? 0.0
          : p2 < least ? least
                       : p2};
}

// What that does to each element of a row. `floors` is of each state (storage.h).
template <typename T, int kCount>
TIGER_EXT_INLINE CatchUp<T> catch_up_with(const Missed& m, const T* floors) {
  CatchUp<T> c;
  c.decay = static_cast<T>(m.decay);
  c.drift = static_cast<T>(m.drift);
  for (int k = 0; k < kCount; ++k) {
    // State k decays by beta1 or beta2, in the order of the states; an only one by the last beta.
    const double factor = kCount == 2 && k == 0 ? m.beta1 : m.beta2;
    c.factor[k] = static_cast<T>(factor);
    if (factor == 0.0) continue;
    const T least = static_cast<T>(sizeof(T) == 8 ? 0x1p-1022 : 0x1p-126);
    if (c.factor[k] < least) c.factor[k] = least;  // Inf must not become NaN
    c.floor[k] = floors[k];
  }
  return c;
}

// A history in a device's memory. The host knows none of its numbers without waiting: a step may
// not have happened, by AMP's found_inf, and a captured graph takes steps of which the host is not
// told. Graphs and kernels know no other address of a history, so that the stretches can move.
struct HistoryClock {
  Stretch* stretches;
  int32_t steps;  // taken so far
  int32_t count;  // of stretches
  int32_t capacity;
  int32_t lost;       // changes for which there was no room
  uint32_t sequence;  // of the last call of the host that was carried out, see HistoryAdvance
};

}  // namespace tiger_ext
