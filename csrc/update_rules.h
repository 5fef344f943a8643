// SPDX-License-Identifier: Apache-2.0
//
// The update rules, for ONE element. Host and device, no torch: this header and
// tiger_ext/reference.py are the only two places where the mathematics is written down.
//
// A rule is a small struct of constants in the arithmetic type T (float, or double for float64
// parameters) with a call operator that advances one parameter element and its state by one step.
// `kStates` says how many state tensors it reads and writes. Every operation is a single IEEE
// operation (multiply-add contraction is off), so all instruction sets and devices agree bit by
// bit.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TIGER_EXT_INLINE __host__ __device__ __forceinline__
#else
#define TIGER_EXT_INLINE inline __attribute__((always_inline))
#endif

namespace tiger_ext {

enum class RuleKind : int8_t {
  kSignMomentum,        // Tiger (beta1 == beta2) and Lion
  kAdamW,               // first and second moment
  kAdamWWithoutMoment1  // beta1 == 0: RMSprop with bias correction, no first moment stored
};

// What the rules need to know, in double, independent of T: one per tensor and step.
struct RuleParams {
  RuleKind kind = RuleKind::kSignMomentum;
  double lr = 0.0;
  double beta1 = 0.0;
  double beta2 = 0.0;
  double eps = 0.0;
  double weight_decay = 0.0;
  double grad_factor = 1.0;       // -1 for maximize, times 1 / grad_scale
  double bias_correction1 = 1.0;  // 1 - beta1^t
  double bias_correction2 = 1.0;  // 1 - beta2^t

  friend bool operator==(const RuleParams& a, const RuleParams& b) {
    return a.kind == b.kind && a.lr == b.lr && a.beta1 == b.beta1 && a.beta2 == b.beta2 &&
           a.eps == b.eps && a.weight_decay == b.weight_decay && a.grad_factor == b.grad_factor &&
           a.bias_correction1 == b.bias_correction1 && a.bias_correction2 == b.bias_correction2;
  }
};

// The bias corrections of step number t.
TIGER_EXT_INLINE void set_bias_corrections(RuleParams& rule, int64_t t) {
  const double steps = static_cast<double>(t);
  rule.bias_correction1 = 1.0 - std::pow(rule.beta1, steps);
  rule.bias_correction2 = 1.0 - std::pow(rule.beta2, steps);
}

// sign(0) = 0, sign(NaN) = NaN: a row without gradient and momentum does not move, and a NaN is
// never hidden.
template <typename T>
TIGER_EXT_INLINE T sign(T x) {
  const T s = static_cast<T>(x > T(0)) - static_cast<T>(x < T(0));
  return x == x ? s : x;
}

// Lion, and Tiger as its special case beta1 == beta2, where the direction is the sign of the new
// momentum: c and the new m are then the same number, computed by the same operations.
//     c = beta1 m + (1 - beta1) g
//     p = (1 - lr wd) p - lr sign(c)
//     m = beta2 m + (1 - beta2) g
template <typename T>
struct SignMomentum {
  static constexpr RuleKind kKind = RuleKind::kSignMomentum;
  static constexpr int kStates = 1;
  T grad_factor, decay, lr, beta1, beta2, one_minus_beta1, one_minus_beta2;

  SignMomentum() = default;
  TIGER_EXT_INLINE explicit SignMomentum(const RuleParams& r)
      : grad_factor(static_cast<T>(r.grad_factor)),
        decay(static_cast<T>(1.0 - r.lr * r.weight_decay)),
        lr(static_cast<T>(r.lr)),
        beta1(static_cast<T>(r.beta1)),
        beta2(static_cast<T>(r.beta2)),
        one_minus_beta1(static_cast<T>(1.0 - r.beta1)),
        one_minus_beta2(static_cast<T>(1.0 - r.beta2)) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p, T& m) const {
    const T g = grad_factor * grad;
    const T c = beta1 * m + one_minus_beta1 * g;
    p = decay * p - lr * sign(c);
    m = beta2 * m + one_minus_beta2 * g;
  }
};

// AdamW with bias correction and decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101):
//     m = beta1 m + (1 - beta1) g
//     v = beta2 v + (1 - beta2) g^2
//     p = (1 - lr wd) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
template <typename T>
struct AdamW {
  static constexpr RuleKind kKind = RuleKind::kAdamW;
  static constexpr int kStates = 2;
  T grad_factor, decay, step_size, beta1, beta2, one_minus_beta1, one_minus_beta2;
  T sqrt_bias_correction2, eps;

  AdamW() = default;
  TIGER_EXT_INLINE explicit AdamW(const RuleParams& r)
      : grad_factor(static_cast<T>(r.grad_factor)),
        decay(static_cast<T>(1.0 - r.lr * r.weight_decay)),
        step_size(static_cast<T>(r.lr / r.bias_correction1)),
        beta1(static_cast<T>(r.beta1)),
        beta2(static_cast<T>(r.beta2)),
        one_minus_beta1(static_cast<T>(1.0 - r.beta1)),
        one_minus_beta2(static_cast<T>(1.0 - r.beta2)),
        sqrt_bias_correction2(static_cast<T>(std::sqrt(r.bias_correction2))),
        eps(static_cast<T>(r.eps)) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p, T& m, T& v) const {
    const T g = grad_factor * grad;
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * (g * g);
    p = decay * p - step_size * (m / (std::sqrt(v) / sqrt_bias_correction2 + eps));
  }
};

// AdamW with beta1 == 0: m is g itself.
template <typename T>
struct AdamWWithoutMoment1 : AdamW<T> {
  static constexpr RuleKind kKind = RuleKind::kAdamWWithoutMoment1;
  static constexpr int kStates = 1;

  AdamWWithoutMoment1() = default;
  TIGER_EXT_INLINE explicit AdamWWithoutMoment1(const RuleParams& r) : AdamW<T>(r) {}

  TIGER_EXT_INLINE void operator()(T grad, T& p, T& v) const {
    T m = T(0);
    AdamW<T>::operator()(grad, p, m, v);
  }
};

}  // namespace tiger_ext
