// SPDX-License-Identifier: Apache-2.0
//
// Rows that are looked at before they are updated: for a learning rate relative to the row's size,
// for NaN and Inf, for whether a strided gradient touches them, for the accumulation window they
// are in. And long rows in a lazy mode. One group of lanes has the whole row, so that the look and
// the update need no memory in between; a row that fits the group's registers is read once.
#include <type_traits>

#include "cuda/lazy_rows.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/roads.h"
#include "cuda/row_tables.cuh"
#include "cuda/rules.cuh"

namespace tiger_ext {
namespace {

// One table. Its streams: parameter, states.
template <typename T, typename Rule, typename Rows>
struct CarefulWork {
  RuleSlot<Rule> rule;
  RuleParams params;
  LazyTable lazy;
  TableEntries table;  // of a direct item: entry r is row r, and there are no keys
  Stream streams[1 + Rule::kStates];
  Rows rows[1 + Rule::kStates];
  uint64_t first_row;
  int32_t* window;      // of each row, or null
  const uint8_t* mask;  // likewise
  int32_t place;        // for `bad`
  int tile;             // entries of a block, at most kThreads
  int lanes;            // of a row: a power of two, at most a warp
};

// A block's rows: where those of sorted entries begin, and what rows in a lazy mode have missed.
template <typename T>
struct CarefulTile {
  RowGap<T> gaps[kThreads];
  RowsOfTile rows;
};

template <typename T, typename Rule, int kWidth, typename Rows, bool kDirect>
struct CarefulUpdate {
  using Item = CarefulWork<T, Rule, Rows>;
  static constexpr int kSharedBytes = sizeof(CarefulTile<T>);
  static constexpr int kMinBlocks = 2;

  Entries all;
  const float* found_inf;
  int32_t* bad;  // if set: nothing is updated, only the first item that is not finite found

  int64_t blocks(const Item& item) const {
    return (item.table.entries + item.tile - 1) / item.tile;
  }

  __device__ void operator()(const Item& item, uint32_t block) const {
    if (step_cancelled(found_inf)) return;
    const TableEntries& t = item.table;
    const int64_t begin = static_cast<int64_t>(block) * item.tile;
    const int thread = static_cast<int>(threadIdx.x), first = thread / item.lanes;
    CarefulTile<T>& shared = shared_memory<CarefulTile<T>>();
    const bool lazy = item.lazy.last_step && !bad;
    if constexpr (kDirect) {
      const int64_t left = t.entries - begin;
      const int count = static_cast<int>(left < item.tile ? left : item.tile);
      if (lazy) {
        if (thread < count && may_be_updated(item, begin + thread))
          look_up(item, static_cast<uint64_t>(begin + thread), shared.gaps[thread]);
        __syncthreads();
      }
      for (int k = first; k < count; k += kThreads / item.lanes)
        Row(item, *this, begin + k, begin + k, 1, all, lazy ? &shared.gaps[k] : nullptr).update();
    } else {
      const Entries tile = t.sorted(all).from(begin);
      const int count = find_rows(t.entries, item.tile, tile, begin, shared.rows);
      const auto row_at = [&](int k) { return tile.row(shared.rows.begins[k]); };
      if (lazy) {
        if (thread < count && row_at(thread) != t.dropped_row)
          look_up(item, row_at(thread) - item.first_row, shared.gaps[thread]);
        __syncthreads();
      }
      for (int k = first; k < count; k += kThreads / item.lanes) {
        const int from = shared.rows.begins[k];
        if (row_at(k) == t.dropped_row) continue;
        Row(item, *this, static_cast<int64_t>(row_at(k) - item.first_row), begin + from,
            shared.rows.begins[k + 1] - from, tile.from(from), lazy ? &shared.gaps[k] : nullptr)
            .update();
      }
    }
  }

 private:
  using Values = RunValues<T, Any, kWidth>;

  // Without a look at the gradient.
  __device__ static bool may_be_updated(const Item& item, int64_t row) {
    const RuleParams& params = item.params;
    if (!params.adds) return item.window[row] == params.window;
    return params.touched != Touched::kMasked || !item.table.values.data || item.mask[row] != 0;
  }

  // Of one row, by one thread.
  __device__ static void look_up(const Item& item, uint64_t row, RowGap<T>& gap) {
    gap.template look_up<Rule::kStates>(item.lazy, item.lazy.last_step[row], item.streams + 1);
  }

  // One row, seen by one of its lanes.
  class Row {
   public:
    // `gap` is null but in a lazy mode.
    __device__ Row(const Item& item, const CarefulUpdate& functor, int64_t row, int64_t entry,
                   int length, const Entries& run, const RowGap<T>* gap)
        : item_(item),
          functor_(functor),
          row_(row),
          entry_(entry),
          length_(length),
          run_(run),
          gap_(gap) {
      const int lane = static_cast<int>(threadIdx.x) % kWarp;
      lane_ = lane % item.lanes;
      group_ = item.lanes == kWarp ? kFullWarp : ((1u << item.lanes) - 1) << (lane - lane_);
      column_ = lane_ * kWidth;
      stride_ = item.lanes * kWidth;
    }

    __device__ void update() {
      const RuleParams& params = item_.params;
      const bool only_look = functor_.bad != nullptr;
      if (kDirect && item_.table.values.data && !touched()) return;
      Rule rule = item_.rule.get();
      if constexpr (Rule::kDirected) {
        if (item_.window && !only_look) {
          const bool in_window = item_.window[row_] == params.window;
          if (!in_window && !params.adds) return;
          if (in_window) rule.stop_decay();
        }
      }
      const bool looks = only_look || params.looks();
      if (looks) {
        const Facts facts = look(rule);
        if (only_look) {
          if (!facts.finite && lane_ == 0) atomicMin(functor_.bad, item_.place);
          return;
        }
        const Verdict verdict = judge(params, facts);
        if (verdict == Verdict::kShrink) shrink();
        if (verdict != Verdict::kUpdate) return;
        if constexpr (Rule::kDirected)
          if (params.scale != Scale::kNone) rule.scale(facts.rate(params, item_.table.dim));
      }
      if (item_.window && params.adds) {
        __syncwarp(group_);  // all lanes have read it
        if (lane_ == 0) item_.window[row_] = params.window;
      }
      if (gap_ && lane_ == 0) item_.lazy.last_step[row_] = item_.lazy.updated();
      const bool kept = looks && item_.table.dim <= stride_;
      for (int c = column_; c < item_.table.dim; c += stride_) {
        if (!kept) load(c);
        if (behind()) gap_->apply(item_.lazy, param_, states_);
        apply_rule(rule, grad_, param_, states_);
        if (moves_param(rule) || behind()) store_param(c);
        store_states(c);
      }
    }

   private:
    __device__ bool touched() {
      const Touched how = item_.params.touched;
      if (how == Touched::kMasked) return item_.mask[row_] != 0;
      if (how == Touched::kAll) return true;
      bool any = false;
      for (int c = column_; c < item_.table.dim && !any; c += stride_) {
        load_grad(c);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) any = any || grad_[w] != T(0);
      }
      return __any_sync(group_, any);
    }

    __device__ Facts look(const Rule& rule) {
      const RuleParams& params = item_.params;
      Facts facts;
      for (int c = column_; c < item_.table.dim; c += stride_) {
        load(c);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          facts.finite = facts.finite && grad_[w] - grad_[w] == T(0);
          facts.params += static_cast<double>(param_[w]) * static_cast<double>(param_[w]);
        }
        if constexpr (Rule::kDirected) {
          if (params.scale == Scale::kNone || params.direction == Direction::kSign) continue;
          rule.with_direction([&]<Direction kDirection>() {
#pragma unroll
            for (int w = 0; w < kWidth; ++w) {
              const double d = static_cast<double>(
                  rule.template direction_at<kDirection>(grad_[w], states_[0][w]));
              facts.directions += d * d;
            }
          });
        }
      }
      for (int distance = item_.lanes / 2; distance > 0; distance /= 2) {
        facts.params += __shfl_xor_sync(group_, facts.params, distance);
        facts.directions += __shfl_xor_sync(group_, facts.directions, distance);
      }
      facts.finite = !__any_sync(group_, !facts.finite);
      return facts;
    }

    // A row that is behind catches up first; shrunk, it counts as untouched.
    __device__ void shrink() {
      const Shrink<T> rule(item_.params);
      for (int c = column_; c < item_.table.dim; c += stride_) {
        load_param(c);
        if (behind()) {
          load_states(c);
          gap_->apply(item_.lazy, param_, states_);
          store_states(c);
        }
#pragma unroll
        for (int w = 0; w < kWidth; ++w) rule(T(0), param_[w]);
        store_param(c);
      }
      if (behind() && lane_ == 0) {
        int32_t& last = item_.lazy.last_step[row_];
        last = item_.lazy.brought(last);
      }
    }

    __device__ bool behind() const { return gap_ && gap_->behind; }

    __device__ int64_t offset(int stream, int c) const {
      return item_.rows[stream].offset(row_, c);
    }

    __device__ void load(int c) {
      load_grad(c);
      load_param(c);
      load_states(c);
    }
    __device__ void load_param(int c) {
      load_vector<Any>(item_.streams[0], offset(0, c), true, param_);
    }
    __device__ void load_states(int c) {
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k)
        load_vector<Any>(item_.streams[1 + k], offset(1 + k, c), true, states_[k]);
    }
    __device__ void store_param(int c) const {
      store_vector<Any>(item_.streams[0], offset(0, c), true, param_);
    }
    __device__ void store_states(int c) const {
#pragma unroll
      for (int k = 0; k < Rule::kStates; ++k)
        store_vector<Any>(item_.streams[1 + k], offset(1 + k, c), true, states_[k]);
    }

    // The row's summed gradient.
    __device__ void load_grad(int c) {
      const TableEntries& t = item_.table;
      if (!t.values.data) {
#pragma unroll
        for (int w = 0; w < kWidth; ++w) grad_[w] = T(0);
      } else if constexpr (kDirect) {
        load_vector<Any>(t.values, row_ * t.value_stride + c, true, grad_);
      } else if (length_ > kPiece) {
        load_packed(static_cast<const T*>(t.sums) + (2 * (entry_ / kPiece) + 1) * t.dim + c, true,
                    grad_);
      } else {
        Values::load(t, run_, 0, c, grad_);
        int i = 1;
        for (; i + 4 <= length_; i += 4) Values::template add<4>(t, run_, i, c, grad_);
        for (; i < length_; ++i) Values::template add<1>(t, run_, i, c, grad_);
      }
    }

    const Item& item_;
    const CarefulUpdate& functor_;
    int64_t row_, entry_;
    int length_;
    Entries run_;
    const RowGap<T>* gap_;
    int lane_, column_, stride_;
    unsigned group_;  // the row's lanes
    T grad_[kWidth], param_[kWidth], states_[Rule::kStates][kWidth];
  };
};

// The works of one rule, arithmetic type and kind of item, by the kernel that fits.
template <typename T, typename Rule, bool kDirect>
class CarefulWorks {
 public:
  void add(const CarefulRows& rows) {
    const RowsItem& item = *rows.item;
    bool wide = !item.values.data || is_aligned(item.values, item.value_stride, item.dim, kWide);
    const auto look = [&](const Stream& s, const RowLayout& layout) {
      wide = wide && is_strided(layout) && is_aligned(s, layout.row_stride, item.dim, kWide);
    };
    look(item.param, item.param_layout);
    for (int k = 0; k < Rule::kStates; ++k) look(item.states[k], item.state_layouts[k]);
    if (wide) wide_.push_back(work<StridedRows>(rows, kWide));
    else any_.push_back(work<AnyRows>(rows, 1));
  }

  void launch(const SortedEntriesCuda& sorted, int32_t* bad, const DeviceContext& context) const {
    const Entries all{sorted.keys, sorted.entry_bits};
    multi_tensor_apply(
        wide_, CarefulUpdate<T, Rule, kWide, StridedRows, kDirect>{all, context.found_inf, bad},
        context.stream);
    multi_tensor_apply(any_,
                       CarefulUpdate<T, Rule, 1, AnyRows, kDirect>{all, context.found_inf, bad},
                       context.stream);
  }

 private:
  static constexpr int kWide = 16 / sizeof(T);

  template <typename Rows>
  static CarefulWork<T, Rule, Rows> work(const CarefulRows& rows, int width) {
    const RowsItem& item = *rows.item;
    CarefulWork<T, Rule, Rows> w{};
    w.rule = {*item.rule.params, rows.resolved};
    w.params = *item.rule.params;
    w.lazy = LazyTable(item.rule);
    w.table = table_entries(item, const_cast<void*>(rows.sums));
    w.streams[0] = item.param;
    set_layout(w.rows[0], item.param_layout);
    for (int k = 0; k < Rule::kStates; ++k) {
      w.streams[1 + k] = item.states[k];
      set_layout(w.rows[1 + k], item.state_layouts[k]);
    }
    w.first_row = static_cast<uint64_t>(item.first_row);
    w.window = item.rule.window;
    w.mask = item.mask;
    w.place = rows.place;
    w.lanes = 1;
    while (w.lanes < kWarp && w.lanes * width < item.dim) w.lanes *= 2;
    w.tile = tile_entries(item.entries, w.table.dim, w.lanes);
    return w;
  }

  std::vector<CarefulWork<T, Rule, StridedRows>> wide_;
  std::vector<CarefulWork<T, Rule, AnyRows>> any_;
};

template <typename T, typename Rule>
void run(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted, int32_t* bad,
         const DeviceContext& context) {
  CarefulWorks<T, Rule, false> sorted_works;
  CarefulWorks<T, Rule, true> direct_works;
  for (const CarefulRows& r : rows) {
    const RowsItem& item = *r.item;
    if (item.dim == 0 || is_compact(item) ||
        kKindOf<Rule> != rule_info(item.rule.params->kind).general ||
        (item.param.storage == Storage::kFloat64) != (sizeof(T) == sizeof(double)))
      continue;
    if (item.direct) direct_works.add(r);
    else sorted_works.add(r);
  }
  sorted_works.launch(sorted, bad, context);
  direct_works.launch(sorted, bad, context);
}

void run_all(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted, int32_t* bad,
             const DeviceContext& context) {
  if (rows.empty()) return;
  // Care costs more than what a plain form saves.
  for_each_type_and_rule([&]<typename T, typename Rule>() {
    if constexpr (std::is_same_v<Rule, typename Rule::General>)
      run<T, Rule>(rows, sorted, bad, context);
  });
}

}  // namespace

void update_careful_rows(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                         const DeviceContext& context) {
  run_all(rows, sorted, nullptr, context);
  update_compact_rows(rows, sorted, context);
}

void find_nonfinite(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                    int32_t* bad, const DeviceContext& context) {
  run_all(rows, sorted, bad, context);
  find_nonfinite_compact(rows, sorted, bad, context);
}

}  // namespace tiger_ext
