// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: what a tensor or row is like, before its update.

// In double and in a fixed order: lane l adds elements l, l + kLanes, ..., then the lanes are
// added.
inline double sum_lanes(double* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

template <typename T>
double sum_of_squares(const T* __restrict x, int64_t n) {
  alignas(kCacheLine) double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const double v = static_cast<double>(x[i + l]);
      lanes[l] += v * v;
    }
  for (; i < n; ++i) lanes[i % kLanes] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum_lanes(lanes);
}

// Of factor * x, in the arithmetic type.
template <typename T>
double sum_of_squares(const T* __restrict x, T factor, int64_t n) {
  alignas(kCacheLine) double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const double v = static_cast<double>(factor * x[i + l]);
      lanes[l] += v * v;
    }
  for (; i < n; ++i) {
    const double v = static_cast<double>(factor * x[i]);
    lanes[i % kLanes] += v * v;
  }
  return sum_lanes(lanes);
}

template <typename T>
bool all_finite(const T* __restrict x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !(x[i] - x[i] == T(0));
  return bad == 0;
}

// Whether a rule's facts include those of the gradient, of the direction.
inline bool wants_finite(const RuleParams& r) {
  return r.adds && r.nonfinite != Nonfinite::kPropagate;
}
inline bool wants_directions(const RuleParams& r) {
  return r.scale != Scale::kNone && r.direction != Direction::kSign;
}

// The facts of one block. `grad` and `exp_avg` matter only if the rule wants something of them.
template <typename T>
Facts look_at(const RuleParams& r, const Momentum<T>& rule, const T* grad, const T* param,
              const T* exp_avg, int64_t n) {
  Facts facts;
  if (wants_finite(r)) facts.finite = all_finite(grad, n);
  if (r.scale != Scale::kNone) facts.params = sum_of_squares(param, n);
  if (wants_directions(r)) {
    alignas(kCacheLine) T d[kBlock];
    rule.with_direction([&]<Direction kDirection>() {
      for (int64_t i = 0; i < n; ++i)
        d[i] = rule.template direction_at<kDirection>(grad[i], exp_avg[i]);
    });
    facts.directions = sum_of_squares(d, n);
  }
  return facts;
}
