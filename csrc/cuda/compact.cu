// SPDX-License-Identifier: Apache-2.0
//
// The update of what has a momentum in int8, is rounded stochastically or has one second moment a
// row: rows of sorted entries, rows of strided gradients, and blocks of tensors. A unit that fits
// its lanes' registers is read once. A longer one is computed twice if its momentum is in int8,
// which cannot be stored before the largest number of all the unit is known.
#include <algorithm>
#include <type_traits>

#include "cuda/compact.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/roads.h"
#include "cuda/rules.cuh"

namespace tiger_ext {
namespace {

enum class UnitKind : int8_t { kSortedRows, kDirectRows, kBlocks };

// One table or tensor. Its streams: parameter, states.
template <typename T, typename Rule, typename Rows>
struct CompactWork {
  RuleSlot<Rule> rule;
  RuleParams params;
  LazyTable lazy;
  CompactState<T> compact;
  TableEntries table;  // of other rows and of blocks: entry r is unit r, and there are no keys
  Stream streams[1 + Rule::kStates];
  Rows rows[1 + Rule::kStates];
  uint64_t first_row;
  int64_t numel;        // of a tensor: its last block may be shorter
  int32_t* window;      // of each row, or null
  const uint8_t* mask;  // likewise
  int32_t place;        // for `bad`
  int tile;             // entries of a block of threads, at most kThreads
  int lanes;            // of a unit: a power of two, at most a warp
  UnitKind kind;
};

// Where units begin, what rows in a lazy mode have missed, and the keys of the random bits.
template <typename T>
struct CompactTile {
  RowGap<T> gaps[kThreads];
  RowsOfTile rows;
  uint64_t param_key, momentum_key;
};

template <typename T, typename Rule, int kWidth, typename Rows>
struct CompactUpdate {
  using Item = CompactWork<T, Rule, Rows>;
  static constexpr int kSharedBytes = sizeof(CompactTile<T>);
  static constexpr int kMinBlocks = 2;

  Entries all;
  const float* found_inf;
  int32_t* bad;  // if set: nothing is updated, only the first item that is not finite found

  int64_t blocks(const Item& item) const {
    return (item.table.entries + item.tile - 1) / item.tile;
  }

  __device__ void operator()(const Item& item, uint32_t block) const {
    if (step_cancelled(found_inf)) return;
    const Verdict verdict = bad ? Verdict::kUpdate : item.rule.verdict();
    if (verdict == Verdict::kSkip) return;
    const TableEntries& t = item.table;
    const int64_t begin = static_cast<int64_t>(block) * item.tile;
    const int thread = static_cast<int>(threadIdx.x), step = kThreads / item.lanes;
    CompactTile<T>& shared = shared_memory<CompactTile<T>>();
    if (thread == 0 && item.compact.steps) {
      // The counter has advanced already, unless the tensor is not updated.
      const int64_t number = *item.compact.steps + (verdict == Verdict::kUpdate ? 0 : 1);
      shared.param_key = item.compact.key(RoundedStream::kParam, number);
      shared.momentum_key = item.compact.key(RoundedStream::kMomentum, number);
    }
    __syncthreads();
    const bool lazy = item.lazy.last_step && !bad;
    if (item.kind != UnitKind::kSortedRows) {
      const int64_t left = t.entries - begin;
      const int count = static_cast<int>(left < item.tile ? left : item.tile);
      if (lazy) {
        if (thread < count && may_be_updated(item, begin + thread))
          look_up(item, begin + thread, shared.gaps[thread]);
        __syncthreads();
      }
      for (int k = thread / item.lanes; k < count; k += step)
        Unit(item, *this, begin + k, begin + k, 1, all, lazy ? &shared.gaps[k] : nullptr)
            .update(verdict);
      return;
    }
    const Entries tile = t.sorted(all).from(begin);
    const int count = find_rows(t.entries, item.tile, tile, begin, shared.rows);
    const auto row_at = [&](int k) { return tile.row(shared.rows.begins[k]); };
    if (lazy) {
      if (thread < count && row_at(thread) != t.dropped_row)
        look_up(item, static_cast<int64_t>(row_at(thread) - item.first_row), shared.gaps[thread]);
      __syncthreads();
    }
    for (int k = thread / item.lanes; k < count; k += step) {
      const int from = shared.rows.begins[k];
      if (row_at(k) == t.dropped_row) continue;
      Unit(item, *this, static_cast<int64_t>(row_at(k) - item.first_row), begin + from,
           shared.rows.begins[k + 1] - from, tile.from(from), lazy ? &shared.gaps[k] : nullptr)
          .update(verdict);
    }
  }

 private:
  static constexpr int kStates = Rule::kStates;

  // Without a look at the gradient.
  __device__ static bool may_be_updated(const Item& item, int64_t row) {
    const RuleParams& params = item.params;
    if (!params.adds) return item.window[row] == params.window;
    return params.touched != Touched::kMasked || !item.table.values.data || item.mask[row] != 0;
  }

  // Of one row, by one thread.
  __device__ static void look_up(const Item& item, int64_t row, RowGap<T>& gap) {
    look_up_gap<T, kStates, kHasRowMoment<Rule>>(item.lazy, item.lazy.last_step[row],
                                                 item.streams + 1, gap);
  }

  // One unit, seen by one of its lanes.
  class Unit {
   public:
    // `gap` is null but in a lazy mode.
    __device__ Unit(const Item& item, const CompactUpdate& functor, int64_t unit, int64_t entry,
                    int length, const Entries& run, const RowGap<T>* gap)
        : item_(item),
          functor_(functor),
          unit_(unit),
          entry_(entry),
          length_(length),
          run_(run),
          gap_(gap),
          lanes_(item.lanes),
          count_(item.table.dim),
          column_(lanes_.own * kWidth),
          stride_(item.lanes * kWidth) {
      if (item.kind == UnitKind::kBlocks && item.numel - unit * kRoundingBlock < count_)
        count_ = static_cast<int>(item.numel - unit * kRoundingBlock);
    }

    __device__ __forceinline__ void update(Verdict verdict) {
      const RuleParams& params = item_.params;
      const bool only_look = functor_.bad != nullptr;
      const bool by_row = item_.kind != UnitKind::kBlocks;
      const bool asks_touched = item_.kind == UnitKind::kDirectRows && item_.table.values.data;
      if (asks_touched && params.touched == Touched::kMasked && item_.mask[unit_] == 0) return;
      const bool asks_nonzero = asks_touched && params.touched == Touched::kNonzero;
      const bool looks = only_look || (by_row && params.looks());
      Facts facts;
      if (asks_nonzero || only_look || (looks && params.nonfinite != Nonfinite::kPropagate)) {
        bool nonzero = false;
        facts.finite = look_at_gradient(nonzero);
        if (asks_nonzero && !nonzero) return;
      }
      if (only_look) {
        if (!facts.finite && lanes_.own == 0) atomicMin(functor_.bad, item_.place);
        return;
      }
      Rule rule = item_.rule.get();
      if constexpr (Rule::kDirected) {
        if (item_.window) {
          const bool in_window = item_.window[unit_] == params.window;
          if (!in_window && !params.adds) return;
          if (in_window) rule.stop_decay();
        }
      }
      if (looks) {
        verdict = judge(params, facts);
        if constexpr (kSigned) {
          if (params.scale != Scale::kNone) {
            look(rule, facts);
            rule.scale(facts.rate(params, count_));
          }
        }
      }
      if (verdict == Verdict::kShrink) shrink();
      if (verdict != Verdict::kUpdate) return;
      update_by(rule);
    }

   private:
    static constexpr bool kSigned = std::is_base_of_v<Momentum<T>, Rule>;

    __device__ __forceinline__ void update_by(Rule& rule) {
      const RuleParams& params = item_.params;
      const CompactState<T>& compact = item_.compact;
      const bool behind = gap_ && gap_->behind;
      CatchUp<T> missed;
      if (behind) missed = gap_->catch_up;
      T moment = T(0);
      if constexpr (kHasRowMoment<Rule>) {
        moment = compact.row_moment[unit_];
        if (behind) missed.template state<kStates>(moment);
        moment = rule.next_moment(moment, mean_square(rule));
        rule.set_moment(moment);
      }
      scale_ = scaled() ? compact.scales[unit_] : 0.0f;
      if (scaled() && behind) {
        scale_ = decayed_scale(missed, scale_);
        missed.factor[0] = T(1);
      }
      const bool quantises = scaled() && params.adds, kept = count_ <= stride_;
      float scale = scale_;
      uint32_t largest = 0;
      const RandomUnit for_param(keys().param_key, unit_);
      const RandomUnit for_momentum(keys().momentum_key, unit_);
      // To find the scale, if there is one to find, and to store.
#pragma unroll 1
      for (bool stores = !quantises;; stores = true) {
        if (stores) {
          if (quantises) scale = quantisation_scale(lanes_.largest(largest));
          __syncwarp(lanes_.mask);  // all lanes have read what one of them writes
          if (lanes_.own == 0) {
            if constexpr (kHasRowMoment<Rule>) compact.row_moment[unit_] = moment;
            if (quantises || (scaled() && behind)) compact.scales[unit_] = scale;
            if (item_.window && params.adds) item_.window[unit_] = params.window;
            if (gap_) item_.lazy.last_step[unit_] = item_.lazy.updated();
          }
        }
#pragma unroll 1
        for (int c = column_; c < count_; c += stride_) {
          if (!(stores && quantises && kept)) advance(rule, behind, missed, c);
          if (!stores) {
#pragma unroll
            for (int w = 0; w < kWidth; ++w) {
              const uint32_t bits = float_bits(static_cast<float>(states_[0][w])) & 0x7FFFFFFFu;
              largest = bits > largest ? bits : largest;
            }
            continue;
          }
          if (moves_param(rule) || behind) store_own_param(for_param, c);
          if constexpr (kStates > 0) {
            if (quantises)
              store_quantised(item_.streams[1], offset(1, c), scale, for_momentum, c, states_[0]);
            else if (!scaled()) store_vector<Any>(item_.streams[1], offset(1, c), true, states_[0]);
          }
          if constexpr (kStates == 2)
            store_vector<Any>(item_.streams[2], offset(2, c), true, states_[1]);
        }
        if (stores) break;
      }
    }

    // Columns [c, c + kWidth), after the update, in registers.
    __device__ __forceinline__ void advance(const Rule& rule, bool behind, const CatchUp<T>& missed,
                                            int c) {
      load_grad(c, grad_);
      load_param(c);
      load_momentum(c);
      if constexpr (kStates == 2)
        load_vector<Any>(item_.streams[2], offset(2, c), true, states_[1]);
      if (behind) catch_up_elements<kStates>(missed, item_.lazy.drifts, param_, states_);
      if constexpr (kStates > 0) {
        apply_rule(rule, grad_, param_, states_);
      } else {
#pragma unroll
        for (int w = 0; w < kWidth; ++w) rule(grad_[w], param_[w]);
      }
    }

    // Returns whether it is finite, and tells whether any element is not zero.
    __device__ __forceinline__ bool look_at_gradient(bool& nonzero) {
      bool bad = false, any = false;
      for (int c = column_; c < count_; c += stride_) {
        load_grad(c, grad_);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          bad = bad || !(grad_[w] - grad_[w] == T(0));
          any = any || grad_[w] != T(0);
        }
      }
      nonzero = __any_sync(lanes_.mask, any);
      return !__any_sync(lanes_.mask, bad);
    }

    // Before rule.scale.
    __device__ __forceinline__ void look(const Rule& rule, Facts& facts) {
      const bool directed = Rule::kDirected && item_.params.direction != Direction::kSign;
      scale_ = scaled() ? item_.compact.scales[unit_] : 0.0f;
      for (int c = column_; c < count_; c += stride_) {
        load_param(c);
#pragma unroll
        for (int w = 0; w < kWidth; ++w)
          facts.params += static_cast<double>(param_[w]) * static_cast<double>(param_[w]);
        if constexpr (Rule::kDirected) {
          if (!directed) continue;
          load_grad(c, grad_);
          load_momentum(c);
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
      for (int distance = lanes_.count / 2; distance > 0; distance /= 2) {
        facts.params += __shfl_xor_sync(lanes_.mask, facts.params, distance);
        facts.directions += __shfl_xor_sync(lanes_.mask, facts.directions, distance);
      }
    }

    // Of the gradient, added up in the order of the CPU's kernels: of each 256 elements 16 sums, of
    // every 16th element, then these by halves. So there are at least 16 lanes.
    __device__ __forceinline__ double mean_square(const Rule& rule) {
      constexpr int kSums = 16;
      double total = 0.0;
      for (int first = 0; first < count_; first += static_cast<int>(kRoundingBlock) * halves()) {
        const int64_t begin = first + lanes_.own / kSums * kRoundingBlock;
        const int64_t end = begin + kRoundingBlock < count_ ? begin + kRoundingBlock : count_;
        double sum = 0.0;
        for (int64_t c = begin + lanes_.own % kSums; c < end; c += kSums) {
          T grad[1];
          load_grad(static_cast<int>(c), grad);
          const double x = static_cast<double>(rule.grad_factor * grad[0]);
          sum += x * x;
        }
        for (int distance = kSums / 2; distance > 0; distance /= 2)
          sum += __shfl_xor_sync(lanes_.mask, sum, distance);
        // `kSums` lanes have the sum of one block, the others of a warp that of the next.
        const double other = __shfl_xor_sync(lanes_.mask, sum, lanes_.count - kSums);
        const bool later = lanes_.own >= kSums;
        total += later ? other : sum;
        if (halves() == 2) total += later ? sum : other;
      }
      return total / static_cast<double>(count_ > 0 ? count_ : 1);
    }
    __device__ int halves() const { return lanes_.count / 16; }

    // A row that is behind catches up first; shrunk, it counts as untouched.
    __device__ __forceinline__ void shrink() {
      const bool behind = gap_ && gap_->behind;
      if (behind) {
        catch_up_row<T, kStates, kHasRowMoment<Rule>, kWidth>(item_.lazy, item_.compact,
                                                              item_.streams, item_.rows, unit_,
                                                              count_, lanes_, gap_->catch_up);
        if (lanes_.own == 0) {
          int32_t& last = item_.lazy.last_step[unit_];
          last = item_.lazy.brought(last);
        }
      }
      const Shrink<T> rule(item_.params);
      const RandomUnit for_param(keys().param_key, unit_);
      for (int c = column_; c < count_; c += stride_) {
        load_param(c);
#pragma unroll
        for (int w = 0; w < kWidth; ++w) rule(T(0), param_[w]);
        store_own_param(for_param, c);
      }
    }

    __device__ __forceinline__ static const CompactTile<T>& keys() {
      return shared_memory<CompactTile<T>>();
    }

    __device__ __forceinline__ bool scaled() const { return kStates > 0 && item_.compact.scales; }

    __device__ __forceinline__ int64_t offset(int stream, int c) const {
      return item_.rows[stream].offset(unit_, c);
    }
    __device__ __forceinline__ void load_param(int c) {
      load_vector<Any>(item_.streams[0], offset(0, c), true, param_);
    }
    __device__ __forceinline__ void load_momentum(int c) {
      if constexpr (kStates > 0) {
        if (scaled()) load_scaled(item_.streams[1], offset(1, c), scale_, states_[0]);
        else load_vector<Any>(item_.streams[1], offset(1, c), true, states_[0]);
      }
    }
    __device__ __forceinline__ void store_own_param(const RandomUnit& random, int c) const {
      store_param(item_.streams[0], offset(0, c), item_.compact.rounds_param, random, c, param_);
    }

    // The unit's summed gradient.
    template <int kCount>
    __device__ __forceinline__ void load_grad(int c, T (&out)[kCount]) const {
      using Values = RunValues<T, Any, kCount>;
      const TableEntries& t = item_.table;
      if (!t.values.data) {
#pragma unroll
        for (int w = 0; w < kCount; ++w) out[w] = T(0);
      } else if (item_.kind != UnitKind::kSortedRows) {
        load_vector<Any>(t.values, unit_ * t.value_stride + c, true, out);
      } else if (length_ > kPiece) {
        load_packed(static_cast<const T*>(t.sums) + (2 * (entry_ / kPiece) + 1) * t.dim + c, true,
                    out);
      } else {
        Values::load(t, run_, 0, c, out);
        int i = 1;
        for (; i + 4 <= length_; i += 4) Values::template add<4>(t, run_, i, c, out);
        for (; i < length_; ++i) Values::template add<1>(t, run_, i, c, out);
      }
    }

    const Item& item_;
    const CompactUpdate& functor_;
    int64_t unit_, entry_;
    int length_;
    Entries run_;
    const RowGap<T>* gap_;
    UnitLanes lanes_;
    int count_, column_, stride_;
    float scale_ = 0.0f;  // of the momentum as it is stored
    T grad_[kWidth], param_[kWidth], states_[kSlots<kStates>][kWidth];
  };
};

// Elements of a lane's vectors: kRoundingBlock fit the registers of a warp.
constexpr int kWide = kRoundingBlock / kWarp;

// Whether an item goes by vectors. Directions, windows and float64 are rarer, and go without.
bool goes_wide(const RuleUse& use, const Stream& param) {
  return param.storage != Storage::kFloat64 && !rule_info(use.params->kind).directed;
}
bool is_wide(const RowsItem& item) {
  bool wide = goes_wide(item.rule, item.param);
  if (item.values.data) wide = wide && is_aligned(item.values, item.value_stride, item.dim, kWide);
  const auto look = [&](const Stream& s, const RowLayout& layout) {
    wide = wide && is_strided(layout) && is_aligned(s, layout.row_stride, item.dim, kWide);
  };
  look(item.param, item.param_layout);
  for (int k = 0; k < rule_info(item.rule.params->kind).states; ++k)
    look(item.states[k], item.state_layouts[k]);
  return wide;
}
bool is_wide(const DenseItem& item) {
  bool wide = goes_wide(item.rule, item.param);
  const auto look = [&](const Stream& s) {
    wide = wide && is_aligned(s, kRoundingBlock, item.numel, kWide);
  };
  look(item.param);
  if (item.grad.data) look(item.grad);
  for (int k = 0; k < rule_info(item.rule.params->kind).states; ++k) look(item.states[k]);
  return wide;
}

// The works of one rule and arithmetic type.
template <typename T, typename Rule>
class Works {
 public:
  void add(const CarefulRows& rows) {
    const RowsItem& item = *rows.item;
    const auto complete = [&](auto& w) {
      w.rule = {*item.rule.params, rows.resolved};
      w.lazy = LazyTable(item.rule);
      w.compact = {item.rule.rounding, item.scales, item.block_scales, item.row_moment};
      w.table = table_entries(item, const_cast<void*>(rows.sums));
      set_layout(w.rows[0], item.param_layout);
      for (int k = 0; k < Rule::kStates; ++k) set_layout(w.rows[1 + k], item.state_layouts[k]);
      w.first_row = static_cast<uint64_t>(item.first_row);
      w.window = item.rule.window;
      w.mask = item.mask;
      w.place = rows.place;
      w.kind = item.direct ? UnitKind::kDirectRows : UnitKind::kSortedRows;
    };
    add(item, is_wide(item), item.entries, item.dim, complete);
  }

  void add(const DenseItem& item, const void* resolved) {
    constexpr int64_t kBlock = kRoundingBlock;
    const int64_t blocks = (item.numel + kBlock - 1) / kBlock;
    RowLayout layout;
    layout.row_stride = kBlock;
    const auto complete = [&](auto& w) {
      w.rule = {*item.rule.params, resolved};
      w.compact = {item.rule.rounding, item.scales, 0, nullptr};
      w.table = {item.grad, kBlock, blocks, 0, 0, nullptr, static_cast<int>(kBlock)};
      for (int k = 0; k <= Rule::kStates; ++k) set_layout(w.rows[k], layout);
      w.numel = item.numel;
      w.kind = UnitKind::kBlocks;
    };
    add(item, is_wide(item), blocks, kBlock, complete);
  }

  void launch(const SortedEntriesCuda& sorted, int32_t* bad, const DeviceContext& context) const {
    const Entries all{sorted.keys, sorted.entry_bits};
    if constexpr (kHasWide)
      multi_tensor_apply(wide_,
                         CompactUpdate<T, Rule, kWide, StridedRows>{all, context.found_inf, bad},
                         context.stream);
    if constexpr (std::is_same_v<Rule, typename Rule::General>)
      multi_tensor_apply(any_, CompactUpdate<T, Rule, 1, AnyRows>{all, context.found_inf, bad},
                         context.stream);
  }

 private:
  static constexpr bool kHasWide = sizeof(T) == 4 && !Rule::kDirected;

  template <typename Item, typename Complete>
  void add(const Item& item, bool wide, int64_t units, int64_t dim, const Complete& complete) {
    if (wide) wide_.push_back(work<StridedRows>(item, kWide, units, dim, complete));
    else any_.push_back(work<AnyRows>(item, 1, units, dim, complete));
  }

  template <typename Rows, typename Item, typename Complete>
  static CompactWork<T, Rule, Rows> work(const Item& item, int width, int64_t units, int64_t dim,
                                         const Complete& complete) {
    CompactWork<T, Rule, Rows> w{};
    w.params = *item.rule.params;
    w.streams[0] = item.param;
    for (int k = 0; k < Rule::kStates; ++k) w.streams[1 + k] = item.states[k];
    w.lanes = lanes_of_unit(dim, width, kHasRowMoment<Rule> ? 16 : 1);
    w.tile = tile_entries(units, static_cast<int>(dim), w.lanes);
    complete(w);
    return w;
  }

  std::vector<CompactWork<T, Rule, StridedRows>> wide_;
  std::vector<CompactWork<T, Rule, AnyRows>> any_;
};

// Whether the kernels of this rule update an item.
template <typename T, typename Rule, typename Item>
bool takes(const Item& item) {
  if ((item.param.storage == Storage::kFloat64) != (sizeof(T) == sizeof(double))) return false;
  const RuleKind kind = item.rule.params->kind;
  return kKindOf<Rule> == (is_wide(item) ? kind : rule_info(kind).general);
}

template <typename F>
void for_each_type_and_group_rule(const F& f) {
  for_each_group_rule<float>(f);
  for_each_group_rule<double>(f);
}

void run_rows(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted, int32_t* bad,
              const DeviceContext& context) {
  if (std::none_of(rows.begin(), rows.end(),
                   [](const CarefulRows& r) { return is_compact(*r.item); }))
    return;
  for_each_type_and_group_rule([&]<typename T, typename Rule>() {
    Works<T, Rule> works;
    for (const CarefulRows& r : rows)
      if (is_compact(*r.item) && takes<T, Rule>(*r.item)) works.add(r);
    works.launch(sorted, bad, context);
  });
}

}  // namespace

void update_compact_rows(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                         const DeviceContext& context) {
  run_rows(rows, sorted, nullptr, context);
}

void find_nonfinite_compact(const std::vector<CarefulRows>& rows, const SortedEntriesCuda& sorted,
                            int32_t* bad, const DeviceContext& context) {
  run_rows(rows, sorted, bad, context);
}

void update_compact_blocks(const std::vector<DenseItem>& items, const RulesOnDevice& rules,
                           const DeviceContext& context) {
  if (std::none_of(items.begin(), items.end(),
                   [](const DenseItem& item) { return item.has_blocks(); }))
    return;
  for_each_type_and_group_rule([&]<typename T, typename Rule>() {
    if constexpr (!kHasRowMoment<Rule>) {
      Works<T, Rule> works;
      for (size_t i = 0; i < items.size(); ++i)
        if (items[i].has_blocks() && takes<T, Rule>(items[i])) works.add(items[i], rules.dense(i));
      works.launch({}, nullptr, context);
    }
  });
}

}  // namespace tiger_ext
