// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: the update of one row: catch-up with the steps it skipped, a look at it, the
// rule.

// What skipped steps do to a row, as constants: many rows of a step have skipped the same ones.
// `from` and params.current are steps.
template <typename T, typename Rule>
class CatchUpTable {
 public:
  explicit CatchUpTable(const RowsItem& item) : params_(*item.rule.params), memory_(memory()) {
    for (int k = 0; k < Rule::kStates; ++k) floors_[k] = smallest_kept<T>(item.states[k].storage);
    if constexpr (kHasRowMoment<Rule>)
      floors_[Rule::kStates] = smallest_kept<T>(native_storage<T>());
  }

  CatchUp<T> operator()(int32_t from) const {
    Entry& entry = memory_[static_cast<uint32_t>(from) % kEntries];
    const uint64_t key = params_.history << 32 | static_cast<uint32_t>(from);
    if (entry.key != key) fill(entry, key, from);
    CatchUp<T> c = entry.catch_up;
    for (int k = 0; k < kMoments<Rule>; ++k) c.floor[k] = c.factor[k] == T(0) ? T(0) : floors_[k];
    return c;
  }

 private:
  struct Entry {
    uint64_t key = 0;
    CatchUp<T> catch_up;  // but for the floors, which differ from item to item
  };
  static constexpr int kEntries = 1024;

  static Entry* memory() {
    static thread_local Entry entries[kEntries];
    return entries;
  }

  __attribute__((noinline)) void fill(Entry& entry, uint64_t key, int32_t from) const {
    const SkippedSteps skipped =
        skipped_steps(params_.stretches, params_.stretch_count, from, params_.current);
    entry.catch_up =
        catch_up_with<T, kMoments<Rule>>(missed(skipped, kMoments<Rule> == 2), floors_);
    entry.key = key;
  }

  const RuleParams& params_;
  Entry* const memory_;
  T floors_[kMaxStates] = {};
};

// Updates one row at a time, after a look at it if its rule asks for one.
template <typename T, typename Rule, bool kInPlace>
class RowUpdate {
 public:
  explicit RowUpdate(const RowsItem& item)
      : item_(item),
        params_(*item.rule.params),
        rule_(params_),
        catch_up_(item),
        careful_(params_.looks() || item.rule.window) {
    if constexpr (!kInPlace && kMixes<T, Rule>) {
      bool contiguous = !item.param_layout.inner;
      for (int k = 0; k < Rule::kStates; ++k)
        contiguous = contiguous && !item.state_layouts[k].inner;
      if (contiguous && !rounds()) {
        mixture_ = mixture_of(Storage::kFloat32, item.param.storage, item.states, Rule::kStates);
        stored_mixture_ =
            mixture_of(item.values.storage, item.param.storage, item.states, Rule::kStates);
      }
    }
  }

  // grad_of: the row's RowGrad.
  template <typename GradOf>
  TIGER_EXT_INLINE void operator()(int64_t row, const GradOf& grad_of) const {
    const Place at = place(row);
    if (!careful_) return update_current(rule_, row, at, grad_of);
    Rule own = rule_;
    if (decide(own, row, at, grad_of)) update_current(own, row, at, grad_of);
  }

  // Only the catch-up. Returns whether there was one. Threads may share rows.
  bool catch_up(int64_t row) const {
    int32_t* const last = item_.rule.last_step + row;
    const int32_t current = params_.current;
    int32_t old = __atomic_load_n(last, __ATOMIC_RELAXED);
    if (current_up_to(old) >= current) return false;
    const int32_t now = old < 0 ? -1 - current : current;
    if (!__atomic_compare_exchange_n(last, &old, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return false;  // another thread does it
    CatchUp<T> missed = catch_up_(current_up_to(old));
    catch_up_units(row, missed);
    const RowGrad none{[](int64_t, int64_t) { return zeros<T>(); },
                       [](int64_t, int64_t) -> const void* { return nullptr; }};
    update(NoUpdate<T, Rule::kStates>(), &missed, row, place(row), none);
    return true;
  }

 private:
  struct Place {  // where the row's vectors start
    int64_t param;
    int64_t states[kMaxStates];
  };

  Place place(int64_t row) const {
    Place at;
    at.param = item_.param_layout.offset(row);
    for (int k = 0; k < Rule::kStates; ++k) at.states[k] = item_.state_layouts[k].offset(row);
    return at;
  }

  // The update of a row, which first catches up with the steps it skipped.
  template <typename GradOf>
  TIGER_EXT_INLINE void update_current(const Rule& rule, int64_t row, const Place& at,
                                       const GradOf& grad_of) const {
    CatchUp<T> missed;
    bool behind = false;
    if (item_.rule.last_step) {
      int32_t& last = item_.rule.last_step[row];
      const int32_t from = current_up_to(last);
      last = params_.updated();
      behind = from < params_.current;
      if (behind) {
        missed = catch_up_(from);
        catch_up_units(row, missed);
      }
    }
    const CatchUp<T>* const skipped = behind ? &missed : nullptr;
    if constexpr (kHasRowMoment<Rule>) {
      T& v = static_cast<T*>(item_.row_moment)[row];
      v = rule.next_moment(v, mean_square(rule, grad_of));
      Rule own = rule;
      own.set_moment(v);
      update(own, skipped, row, at, grad_of);
    } else {
      update(rule, skipped, row, at, grad_of);
    }
  }

  // What skipped steps do to a row's own numbers, which are not its elements'.
  TIGER_EXT_INLINE void catch_up_units(int64_t row, CatchUp<T>& missed) const {
    if constexpr (kHasRowMoment<Rule>)
      missed.template state<Rule::kStates>(static_cast<T*>(item_.row_moment)[row]);
    if constexpr (!kInPlace && Rule::kStates > 0) {
      if (!item_.scales) return;
      const int64_t first = item_.block_scales ? 0 : row;
      const int64_t count = item_.block_scales ? item_.block_scales : 1;
      for (int64_t k = first; k < first + count; ++k) {
        T scale = static_cast<T>(item_.scales[k]);
        missed.template state<0>(scale);
        item_.scales[k] = static_cast<float>(scale);
      }
      missed.factor[0] = T(1);
    }
  }

  template <typename GradOf>
  TIGER_EXT_INLINE double mean_square(const Rule& rule, const GradOf& grad_of) const {
    double total = 0.0;
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      total += sum_of_squares(grad_of(c, n), rule.grad_factor, n);
    }
    return total / static_cast<double>(item_.dim > 0 ? item_.dim : 1);
  }

  bool rounds() const { return item_.scales || item_.rule.rounding.param; }

  // `missed`: null if the row is current.
  template <typename AnyRule, typename GradOf>
  TIGER_EXT_INLINE void update(const AnyRule& rule, const CatchUp<T>* missed, int64_t row,
                               const Place& at, const GradOf& grad_of) const {
    if constexpr (!kInPlace) {
      if (rounds())
        return after(rule, missed,
                     [&](const auto& whole) { update_rounded(whole, row, at, grad_of); });
    }
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      if constexpr (!kInPlace && kMixes<T, Rule>) {
        const void* const stored =
            stored_mixture_ != Mixture::kOther ? grad_of.stored(c, n) : nullptr;
        if (stored) {
          const BlockPlace where = block_place(at, c);
          after(rule, missed, [&](const auto& whole) {
            apply_mixture(stored_mixture_, whole, stored, item_.param, where.param, item_.states,
                          where.states, n);
          });
          continue;
        }
      }
      const T* const grad = grad_of(c, n);
      after(rule, missed, [&](const auto& whole) {
        if constexpr (kInPlace) {
          T* states[kMaxStates];
          for (int k = 0; k < Rule::kStates; ++k)
            states[k] = static_cast<T*>(item_.states[k].data) + at.states[k] + c;
          apply(whole, grad, static_cast<T*>(item_.param.data) + at.param + c, states, n);
        } else {
          const BlockPlace where = block_place(at, c);
          if constexpr (kMixes<T, Rule>)
            if (mixture_ != Mixture::kOther)
              return apply_mixture(mixture_, whole, grad, item_.param, where.param, item_.states,
                                   where.states, n);
          apply_converted(whole, grad, item_.param, item_.states, where, n);
        }
      });
    }
  }

  // A row that is rounded stochastically. A momentum in int8 needs the largest magnitude of all the
  // row before it can be stored: longer rows than a block are computed twice.
  template <typename AnyRule, typename GradOf>
  __attribute__((noinline)) void update_rounded(const AnyRule& rule, int64_t row, const Place& at,
                                                const GradOf& grad_of) const {
    constexpr bool kOnlyCatchesUp = requires { AnyRule::kOnlyCatchesUp; };
    const Rounding& rounding = item_.rule.rounding;
    const float scale = item_.scales && !item_.block_scales ? item_.scales[row] : 0.0f;
    const bool quantises = item_.scales && !kOnlyCatchesUp && params_.adds;
    uint32_t largest = 0;
    for (int64_t c = 0; quantises && item_.dim > kBlock && c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      const BlockPlace where = block_place(at, c);
      Block<T, Rule::kStates> block(item_.param, item_.states, where, n);
      block.update(rule, grad_of(c, n), scale);
      const uint32_t found = largest_bits(block.momentum(), n);
      largest = found > largest ? found : largest;
    }
    if (quantises && item_.dim > kBlock) item_.scales[row] = quantisation_scale(largest);
    const RandomUnit for_param(kOnlyCatchesUp ? rounding.caught_up_key : rounding.param_key, row);
    QuantisedUnit unit{scale, quantises ? item_.scales + row : nullptr, item_.dim > kBlock,
                       RandomUnit(rounding.momentum_key, row)};
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      if (item_.block_scales) unit.scale = item_.scales[c / kBlock];
      update_rounded_block(rule, grad_of(c, n), item_.param, item_.states, block_place(at, c), n,
                           rounding.param ? &for_param : nullptr, c, unit);
    }
  }

  // f(the rule, after the catch-up if there is one).
  template <typename AnyRule, typename F>
  TIGER_EXT_INLINE void after(const AnyRule& rule, const CatchUp<T>* missed, const F& f) const {
    if (!missed) return f(rule);
    if constexpr (std::is_base_of_v<Momentum<T>, Rule>)
      if (params_.lazy == Lazy::kExact) return f(AfterCatchUp<T, AnyRule, true>(rule, *missed));
    f(AfterCatchUp<T, AnyRule, false>(rule, *missed));
  }

  // Whether the row is to be updated, and by which rule. Shrinks it if that is the verdict.
  template <typename GradOf>
  __attribute__((noinline)) bool decide(Rule& rule, int64_t row, const Place& at,
                                        const GradOf& grad_of) const {
    int32_t* const window = item_.rule.window ? item_.rule.window + row : nullptr;
    if constexpr (std::is_base_of_v<Momentum<T>, Rule>) {
      if (window) {
        const bool in_window = *window == params_.window;
        if (!in_window && !params_.adds) return false;
        if (in_window) rule.stop_decay();
      }
    }
    if (params_.looks()) {
      const Facts facts = look(rule, row, at, grad_of);
      const Verdict verdict = judge(params_, facts);
      if (verdict == Verdict::kShrink) {
        if (item_.rule.last_step) catch_up(row);
        shrink(row, at);
      }
      if (verdict != Verdict::kUpdate) return false;
      if constexpr (std::is_base_of_v<Momentum<T>, Rule>)
        if (params_.scale != Scale::kNone) rule.scale(facts.rate(params_, item_.dim));
    }
    if (window && params_.adds) *window = params_.window;
    return true;
  }

  template <typename GradOf>
  Facts look(const Rule& rule, int64_t row, const Place& at, const GradOf& grad_of) const {
    Facts facts;
    alignas(kCacheLine) T param[kBlock], exp_avg[kBlock];
    const bool directions = wants_directions(params_);
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      const T* const g = directions || wants_finite(params_) ? grad_of(c, n) : nullptr;
      const T* p = nullptr;
      const T* m = nullptr;
      if (params_.scale != Scale::kNone)
        p = view(item_.param, offset(item_.param_layout, at.param, c), index(item_.param_layout, c),
                 n, param);
      if (directions)
        m = momentum_view(item_, item_.states[0], offset(item_.state_layouts[0], at.states[0], c),
                          index(item_.state_layouts[0], c), row, n, exp_avg);
      if constexpr (std::is_base_of_v<Momentum<T>, Rule>)
        facts.add(look_at<T>(params_, rule, g, p, m, n));
      else facts.add(look_at<T>(params_, Momentum<T>(), g, p, m, n));
    }
    return facts;
  }

  void shrink(int64_t row, const Place& at) const {
    const Shrink<T> rule(params_);
    const Rounding& rounding = item_.rule.rounding;
    for (int64_t c = 0; c < item_.dim; c += kBlock) {
      const int64_t n = item_.dim - c < kBlock ? item_.dim - c : kBlock;
      const BlockPlace where = block_place(at, c);
      Block<T, 0> block(item_.param, nullptr, where, n);
      block.update(rule, zeros<T>());
      if (rounding.param) block.store_param(RandomUnit(rounding.param_key, row), c);
      else block.store_param();
    }
  }

  BlockPlace block_place(const Place& at, int64_t c) const {
    BlockPlace where;
    where.param = offset(item_.param_layout, at.param, c);
    where.param_index = index(item_.param_layout, c);
    for (int k = 0; k < Rule::kStates; ++k) {
      where.states[k] = offset(item_.state_layouts[k], at.states[k], c);
      where.state_indices[k] = index(item_.state_layouts[k], c);
    }
    return where;
  }

  // Through an index, offsets count from the start of the row's vector.
  static int64_t offset(const RowLayout& layout, int64_t start, int64_t c) {
    return layout.inner ? start : start + c;
  }
  static const int64_t* index(const RowLayout& layout, int64_t c) {
    return layout.inner ? layout.inner + c : nullptr;
  }

  const RowsItem& item_;
  const RuleParams& params_;
  const Rule rule_;
  const CatchUpTable<T, Rule> catch_up_;
  const bool careful_;
  // With the gradient in the arithmetic type, and as it is stored.
  Mixture mixture_ = Mixture::kOther, stored_mixture_ = Mixture::kOther;
};
