// SPDX-License-Identifier: Apache-2.0
//
// The p-norm of many numbers, from parts: no torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace tiger_ext {

enum class NormKind : int8_t { kSquares, kAbsolutes, kPowers, kNonzeros, kMaximum, kMinimum };

// Which numbers a p-norm adds up; p = inf and -inf take the largest and smallest magnitude instead.
inline NormKind norm_kind(double p) {
  if (p == 2.0) return NormKind::kSquares;
  if (p == 1.0) return NormKind::kAbsolutes;
  if (p == 0.0) return NormKind::kNonzeros;
  if (std::isinf(p)) return p > 0 ? NormKind::kMaximum : NormKind::kMinimum;
  return NormKind::kPowers;
}

// What some of the rows contribute to the norm of a table's gradient. NaN stays NaN throughout.
struct NormPart {
  double total = 0.0;  // the sum of |x|^p, or the largest or smallest |x|
  int64_t rows = 0;    // how many rows these are

  static NormPart nothing(NormKind kind) {
    return {kind == NormKind::kMinimum ? std::numeric_limits<double>::infinity() : 0.0, 0};
  }

  void add(NormKind kind, const NormPart& other) {
    rows += other.rows;
    if (kind == NormKind::kMaximum || kind == NormKind::kMinimum) {
      const bool take = kind == NormKind::kMaximum ? other.total > total : other.total < total;
      if (take || std::isnan(other.total)) total = other.total;
    } else {
      total += other.total;
    }
  }

  // The norm, once all parts are added and of `all_rows` those that have no part are zero.
  double norm(double p, int64_t all_rows) const {
    const NormKind kind = norm_kind(p);
    switch (kind) {
      case NormKind::kSquares:
        return std::sqrt(total);
      case NormKind::kPowers:
        // With p < 0 a single zero makes the sum infinite and the norm zero.
        return std::pow(total + (rows < all_rows ? std::pow(0.0, p) : 0.0), 1.0 / p);
      case NormKind::kMinimum:
        return rows < all_rows && !std::isnan(total) ? 0.0 : total;
      default:
        return total;
    }
  }
};

}  // namespace tiger_ext
