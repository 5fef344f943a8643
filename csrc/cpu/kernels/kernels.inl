// SPDX-License-Identifier: Apache-2.0
//
// The leaf kernels, compiled once per instruction set: each <isa>.cpp opens a target region
// and includes this file in a namespace of its own. Loops are plain; the compiler vectorises them.
//
// Tensors whose storage is the arithmetic type are updated in place ("native"), and the common
// mixtures with half precision in one pass; all others go through blocks of kBlock elements in the
// L1 cache, so that any mixture of storage types costs one conversion loop per type instead of one
// kernel per combination.

namespace {

constexpr int64_t kBlock = 256;
static_assert(kBlock == kRoundingBlock);
constexpr int64_t kCacheLine = 64;
constexpr int kLanes = 16;  // elements that are handled at once

template <typename T>
constexpr Storage native_storage() {
  return sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32;
}

#include "cpu/kernels/lanes.inl"
#include "cpu/kernels/load_store.inl"
#include "cpu/kernels/mixtures.inl"
#include "cpu/kernels/look.inl"
#include "cpu/kernels/row_sums.inl"
#include "cpu/kernels/dense.inl"
#include "cpu/kernels/row_update.inl"
#include "cpu/kernels/rows.inl"
#include "cpu/kernels/catch_up.inl"

// ------------------------------------------------------------------- arithmetic type and rule

inline bool is_double(const Stream& param) { return param.storage == Storage::kFloat64; }

// f.template operator()<T, Rule>()
template <typename Item, typename F>
void with_rule_of(const Item& item, const F& f) {
  if (is_double(item.param)) with_rule<double>(item.rule.params->kind, f);
  else with_rule<float>(item.rule.params->kind, f);
}

template <typename T>
void sum_piece_as(const RowsItem& item, const SortedEntries& s, int64_t begin, int64_t end,
                  T* out) {
  for (int64_t c = 0; c < item.dim; c += kBlock)
    sum_entries(item, s, begin, end, c, item.dim - c < kBlock ? item.dim - c : kBlock, out + c);
}

// For for_each_run and for_each_touched_row: stops at the first row that is not finite.
template <typename T>
struct FindNonfinite {
  const RowsItem& item;
  bool& finite;

  template <typename GradOf>
  bool operator()(int64_t, const GradOf& grad_of) const {
    for (int64_t c = 0; c < item.dim && finite; c += kBlock) {
      const int64_t n = item.dim - c < kBlock ? item.dim - c : kBlock;
      finite = all_finite(grad_of(c, n), n);
    }
    return finite;
  }
};

// ---------------------------------------------------------------------------- the table's entries

void dense(const DenseItem& item, int64_t begin, int64_t end) {
  with_rule_of(item, [&]<typename T, typename Rule>() {
    if constexpr (!kHasRowMoment<Rule>) dense_span<T, Rule>(item, begin, end);
  });
}

Facts look(const DenseItem& item, int64_t begin, int64_t end) {
  return is_double(item.param) ? look_at_span<double>(item, begin, end)
                               : look_at_span<float>(item, begin, end);
}

void rows(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
          int64_t begin, int64_t end) {
  with_rule_of(item, [&]<typename T, typename Rule>() {
    if constexpr (kIsOfGroups<Rule>)
      RowsOfRule<T, Rule>::sorted(item, sorted, long_runs, begin, end);
  });
}

void direct(const RowsItem& item, int64_t begin, int64_t end) {
  with_rule_of(item, [&]<typename T, typename Rule>() {
    if constexpr (kIsOfGroups<Rule>) RowsOfRule<T, Rule>::direct(item, begin, end);
  });
}

int64_t catch_up(const RowsItem& item, const int64_t* ids, int64_t begin, int64_t end) {
  int64_t written = 0;
  with_rule_of(item, [&]<typename T, typename Rule>() {
    if constexpr (kIsOfGroups<Rule>) written = CatchUpOfRule<T, Rule>::run(item, ids, begin, end);
  });
  return written;
}

bool rows_finite(const RowsItem& item, const SortedEntries& sorted, const LongRuns& long_runs,
                 int64_t begin, int64_t end) {
  bool finite = true;
  if (is_double(item.param))
    for_each_run<double, NoPrefetch>(item, sorted, long_runs, begin, end,
                                     FindNonfinite<double>{item, finite});
  else
    for_each_run<float, NoPrefetch>(item, sorted, long_runs, begin, end,
                                    FindNonfinite<float>{item, finite});
  return finite;
}

bool direct_finite(const RowsItem& item, int64_t begin, int64_t end) {
  bool finite = true;
  if (is_double(item.param))
    for_each_touched_row<double>(item, begin, end, FindNonfinite<double>{item, finite});
  else for_each_touched_row<float>(item, begin, end, FindNonfinite<float>{item, finite});
  return finite;
}

void sum_piece(const RowsItem& item, const SortedEntries& sorted, int64_t begin, int64_t end,
               void* out) {
  if (is_double(item.param)) sum_piece_as(item, sorted, begin, end, static_cast<double*>(out));
  else sum_piece_as(item, sorted, begin, end, static_cast<float*>(out));
}

void combine_pieces(const RowsItem& item, void* pieces, int64_t count) {
  if (is_double(item.param)) combine_pieces_as<double>(item, pieces, count);
  else combine_pieces_as<float>(item, pieces, count);
}

#include "cpu/kernels/norms.inl"

constexpr CpuKernels table(const char* name) {
  return {name,          dense,    look,      rows,           rows_finite,        direct,
          direct_finite, catch_up, sum_piece, combine_pieces, repeated_rows_norm, other_rows_norm};
}

}  // namespace
