// SPDX-License-Identifier: Apache-2.0
//
// The norms of summed rows; part of cpu/kernels/kernels.inl. First the rows with several entries,
// which marks these entries; then all other entries, in the order in which they lie in memory: that
// is several times as fast as in the order of their rows. In double, and in a fixed order: elements
// go to kLanes lanes in turn, and the lanes are added at the end.

template <NormKind kKind>
class Norm {
 public:
  explicit Norm(double p) : p_(p) {
    for (double& lane : lanes_) lane = NormPart::nothing(kKind).total;
  }

  template <typename T>
  TIGER_EXT_INLINE void add(const T* __restrict x, int64_t n) {
    static_assert(kBlock % kLanes == 0);
    alignas(kCacheLine) double lanes[kLanes];
    int64_t i = 0;
    if (n >= kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] = lanes_[l];
      for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) add(lanes[l], static_cast<double>(x[i + l]));
      for (int l = 0; l < kLanes; ++l) lanes_[l] = lanes[l];
    }
    for (; i < n; ++i) add(lanes_[i % kLanes], static_cast<double>(x[i]));
  }

  NormPart part(int64_t rows) const {
    NormPart sum = NormPart::nothing(kKind);
    for (const double lane : lanes_) sum.add(kKind, {lane, 0});
    sum.rows = rows;
    return sum;
  }

 private:
  TIGER_EXT_INLINE void add(double& lane, double x) const {
    if constexpr (kKind == NormKind::kSquares) lane += x * x;
    else if constexpr (kKind == NormKind::kNonzeros) lane += x != 0.0 ? 1.0 : 0.0;
    else if constexpr (kKind == NormKind::kAbsolutes) lane += std::fabs(x);
    else if constexpr (kKind == NormKind::kPowers) lane += std::pow(std::fabs(x), p_);
    else add_extreme(lane, std::fabs(x));
  }
  // A NaN is taken, and then nothing compares true with it.
  static TIGER_EXT_INLINE void add_extreme(double& lane, double x) {
    const bool take = kKind == NormKind::kMaximum ? x > lane : x < lane;
    lane = take || x != x ? x : lane;
  }

  alignas(kCacheLine) double lanes_[kLanes];
  const double p_;
};

// Fetches the repeated entries ahead.
class RepeatedPrefetcher {
 public:
  RepeatedPrefetcher(const RowsItem& item, const SortedEntries& sorted, int64_t begin)
      : item_(item), sorted_(sorted), next_(begin), size_(storage_size(item.values.storage)) {
    const int64_t bytes = item.dim * size_;
    ahead_ = bytes * kMaxAhead <= kBytesAhead ? kMaxAhead : (kBytesAhead + bytes - 1) / bytes;
  }

  // Of rows of several blocks only the first one: they are few, and long enough for the hardware.
  TIGER_EXT_INLINE void operator()(int64_t begin, int64_t end) {
    const int64_t first = item_.first_entry, limit = first + item_.entries;
    if (next_ < end && end - begin > ahead_) next_ = end;  // the summation fetches for itself
    for (const int64_t until = end + ahead_ < limit ? end + ahead_ : limit; next_ < until;
         ++next_) {
      const uint64_t row = sorted_.row(next_);
      if (!(next_ > first && sorted_.row(next_ - 1) == row) &&
          !(next_ + 1 < limit && sorted_.row(next_ + 1) == row))
        continue;
      const int64_t entry = sorted_.position(next_) - first;
      prefetch_bytes(
          static_cast<const char*>(item_.values.data) + entry * item_.value_stride * size_,
          (item_.dim < kBlock ? item_.dim : kBlock) * size_);
    }
  }

 private:
  static constexpr int64_t kBytesAhead = 16384;
  static constexpr int64_t kMaxAhead = 64;

  const RowsItem& item_;
  const SortedEntries& sorted_;
  int64_t next_, size_, ahead_;
};

template <typename T, NormKind kKind>
NormPart norm_of_repeated(const RowsItem& item, const SortedEntries& sorted,
                          const LongRuns& long_runs, int64_t begin, int64_t end, double p,
                          uint8_t* repeated) {
  const int64_t limit = item.first_entry + item.entries;
  Norm<kKind> norm(p);
  int64_t rows = 0, i = begin;
  if (i > item.first_entry)  // a run that started before `begin` is not ours
    while (i < end && sorted.row(i) == sorted.row(i - 1)) i = run_end(sorted, i, limit);
  RepeatedPrefetcher prefetch(item, sorted, i);
  alignas(kCacheLine) T sum[kBlock];
  for (int64_t next; i < end; i = next) {
    next = run_end(sorted, i, limit);
    for (int64_t k = i; k < next; ++k) repeated[sorted.position(k)] = next - i > 1;
    if (next - i == 1) continue;
    ++rows;
    prefetch(i, next);
    const T* const whole = next - i > kPiece ? find_long_run<T>(long_runs, i) : nullptr;
    for (int64_t c = 0; c < item.dim; c += kBlock) {
      const int64_t n = item.dim - c < kBlock ? item.dim - c : kBlock;
      if (!whole) sum_run(item, sorted, i, next, c, n, sum);
      norm.add(whole ? whole + c : sum, n);
    }
  }
  return norm.part(rows);
}

template <typename T, NormKind kKind>
NormPart norm_of_others(const RowsItem& item, int64_t begin, int64_t end, double p,
                        const uint8_t* repeated) {
  Norm<kKind> norm(p);
  int64_t rows = 0;
  alignas(kCacheLine) T buffer[kBlock];
  for (int64_t e = begin, next; e < end; e = next) {
    next = e + 1;
    if (repeated[e]) continue;
    if (item.value_stride == item.dim)  // neighbours in memory are one vector
      while (next < end && !repeated[next]) ++next;
    rows += next - e;
    const int64_t elements = (next - e) * item.dim;
    for (int64_t c = 0; c < elements; c += kBlock) {
      const int64_t n = elements - c < kBlock ? elements - c : kBlock;
      norm.add(view(item.values, e * item.value_stride + c, nullptr, n, buffer), n);
    }
  }
  return norm.part(rows);
}

// f.template operator()<T, NormKind>()
template <typename T, typename F>
NormPart with_norm_of(double p, const F& f) {
  switch (norm_kind(p)) {
    case NormKind::kSquares:
      return f.template operator()<T, NormKind::kSquares>();
    case NormKind::kAbsolutes:
      return f.template operator()<T, NormKind::kAbsolutes>();
    case NormKind::kPowers:
      return f.template operator()<T, NormKind::kPowers>();
    case NormKind::kNonzeros:
      return f.template operator()<T, NormKind::kNonzeros>();
    case NormKind::kMaximum:
      return f.template operator()<T, NormKind::kMaximum>();
    case NormKind::kMinimum:
      break;
  }
  return f.template operator()<T, NormKind::kMinimum>();
}

template <typename F>
NormPart with_norm(const RowsItem& item, double p, const F& f) {
  return is_double(item.param) ? with_norm_of<double>(p, f) : with_norm_of<float>(p, f);
}

NormPart repeated_rows_norm(const RowsItem& item, const SortedEntries& sorted,
                            const LongRuns& long_runs, int64_t begin, int64_t end, double p,
                            uint8_t* repeated) {
  return with_norm(item, p, [&]<typename T, NormKind kKind>() {
    return norm_of_repeated<T, kKind>(item, sorted, long_runs, begin, end, p, repeated);
  });
}

NormPart other_rows_norm(const RowsItem& item, int64_t begin, int64_t end, double p,
                         const uint8_t* repeated) {
  return with_norm(item, p, [&]<typename T, NormKind kKind>() {
    return norm_of_others<T, kKind>(item, begin, end, p, repeated);
  });
}
