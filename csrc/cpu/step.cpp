// SPDX-License-Identifier: Apache-2.0
//
// A step on the CPU: items, the plan of the rows, and the three roads.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/float_mode.h"
#include "cpu/parallel.h"
#include "cpu/roads.h"
#include "cpu/row_plan.h"
#include "step/checks.h"
#include "step/item_builder.h"
#include "step/step.h"

namespace tiger_ext {
namespace {

class CpuStep final : public DeviceStep {
 public:
  explicit CpuStep(const StepContext& context) {
    cpu_kernels();  // a wrong TIGER_EXT_CPU_ISA shows before anything is written
    if (context.grad_scale.defined()) grad_scale_ = context.grad_scale.item<double>();
    cancelled_ = context.found_inf.defined() && context.found_inf.item<double>() != 0.0;
  }

  void add(Update& u) override {
    const FloatMode mode;
    check_update(u);
    u.rule.grad_factor /= grad_scale_;
    if (u.lr.defined()) u.rule.lr = u.lr.item<double>();
    if (u.step.defined()) {
      correct_bias(u.rule, *u.step.const_data_ptr<int64_t>() + 1);
    }
    if (u.rule.adds && u.window.defined() && u.window.dim() == 0)
      u.rule.decays = *u.window.const_data_ptr<int32_t>() != u.rule.window;
    builder_.add(u, nullptr, u.step.defined() ? u.step.mutable_data_ptr<int64_t>() : nullptr);
  }

  void prepare() override {
    const FloatMode mode;
    check_finite(dense_road_.prepare(builder_.dense()), builder_.dense_places());
    check_finite(direct_road_.prepare(builder_.direct()), builder_.direct_places());
    const std::vector<RowsItem>& rows = builder_.rows();
    if (rows.empty()) return;
    const BadIndex bad = plan_rows(rows, builder_.indices(), scratch_, sorted_);
    if (bad.item < 0)
      return check_finite(rows_road_.prepare(rows, sorted_, scratch_), builder_.row_places());
    const RowIndices& ix = builder_.indices()[bad.item];
    const int64_t index = ix.data[bad.dimension * ix.dim_stride + bad.entry * ix.entry_stride];
    throw bad_index(builder_.row_places()[bad.item], bad.entry, index, bad.dimension,
                    ix.sizes[bad.dimension]);
  }

  bool lags(const Update& u) const override {
    if (!is_row_state(u, u.last_step)) return false;  // `add` refuses it
    const int32_t* last = u.last_step.const_data_ptr<int32_t>();
    return std::any_of(last, last + u.last_step.numel(),
                       [&](int32_t l) { return current_up_to(l) < u.rule.current; });
  }

  std::optional<bool> cancelled() const override { return cancelled_; }

  // Histories that the CPU reads belong to the host.
  void will_advance(const std::vector<HistoryStep>&,
                    const std::vector<at::Tensor>& counters) override {
    counters_ = counters;
  }

  void advance() override {
    if (cancelled_) return;
    for (const at::Tensor& counter : counters_) ++*counter.mutable_data_ptr<int64_t>();
  }

  void apply() override {
    const at::NoGradGuard no_grad;
    const FloatMode mode;
    builder_.start();
    begin_rounding(builder_.dense());
    begin_rounding(builder_.direct());
    begin_rounding(builder_.rows());
    // A parameter that no gradient of the window reached does not move.
    for (DenseItem& item : builder_.dense())
      if (!item.rule.params->adds && *item.rule.window != item.rule.params->window) {
        item.numel = 0;
        item.rule.step = nullptr;
        item.rule.window = item.rule.last_step = nullptr;
      }
    dense_road_.run();
    direct_road_.run();
    rows_road_.run();
    for (const DenseItem& item : builder_.dense()) {
      if (item.rule.step) ++*item.rule.step;
      if (item.rule.window) *item.rule.window = item.rule.params->window;
      if (item.rule.last_step)
        std::fill_n(item.rule.last_step, item.rule.last_steps, item.rule.params->updated());
    }
    for (const RowsItem& item : builder_.direct()) advance(item.rule);
    for (const RowsItem& item : builder_.rows()) advance(item.rule);
    for (const RuleUse& rule : builder_.idle()) advance(rule);
    builder_.finish();
  }

 private:
  static void advance(const RuleUse& rule) {
    if (rule.step) ++*rule.step;
  }

  // Only now is it known how many steps a parameter has taken: another pass of the same step may
  // have come before.
  template <typename Item>
  static void begin_rounding(std::vector<Item>& items) {
    for (Item& item : items) {
      RuleUse& rule = item.rule;
      if (rule.rounding.momentum || rule.rounding.param) rule.rounding.begin(rule.params->current);
    }
  }

  static void check_finite(int64_t bad_item, const std::vector<UpdatePlace>& places) {
    if (bad_item >= 0) throw nonfinite_gradient(places[bad_item]);
  }

  // Most parameters have taken the same number of steps.
  void correct_bias(RuleParams& rule, int64_t step) {
    if (step != corrected_step_ || rule.beta1 != corrected_.beta1 ||
        rule.beta2 != corrected_.beta2) {
      corrected_step_ = step;
      corrected_ = rule;
      set_bias_corrections(corrected_, step);
    }
    rule.bias_correction1 = corrected_.bias_correction1;
    rule.bias_correction2 = corrected_.bias_correction2;
  }

  int64_t corrected_step_ = -1;
  RuleParams corrected_;
  double grad_scale_ = 1.0;
  bool cancelled_ = false;
  std::vector<at::Tensor> counters_;  // of parameters without a gradient
  ItemBuilder builder_;
  Scratch scratch_;
  SortedEntries sorted_;
  DenseRoad dense_road_;
  DirectRoad direct_road_;
  RowsRoad rows_road_;
};

constexpr int64_t kElementsPerTask = 65536;

void catch_up(Update& u, const at::Tensor& ids, int64_t begin, int64_t end) {
  const at::NoGradGuard no_grad;
  const FloatMode mode;
  check_table(u, ids, begin, end);
  ItemBuilder builder;
  builder.add_table(u);
  RowsItem& item = builder.direct().front();
  item.rule.rounding.begin(item.rule.params->current);
  at::Tensor list;
  const int64_t* rows = nullptr;
  if (ids.defined()) {
    list = ids.to(at::kCPU, at::kLong).contiguous();
    rows = list.const_data_ptr<int64_t>();
    begin = 0;
    end = list.numel();
    uint64_t signs = 0;  // of ids below 0 and of those past the last row
    for (int64_t i = 0; i < end; ++i) {
      const uint64_t id = static_cast<uint64_t>(rows[i]);
      signs |= id | (static_cast<uint64_t>(item.rows) - 1 - id);
    }
    for (int64_t i = 0; static_cast<int64_t>(signs) < 0; ++i)
      if (rows[i] < 0 || rows[i] >= item.rows)
        throw UpdateError(UpdateError::Kind::kIndex, {u.group, u.position},
                          c10::str("id ", rows[i], " is out of range for ", item.rows, " rows"));
  }
  if (item.dim == 0) return;
  const int64_t rows_per_task =
      std::clamp<int64_t>(kElementsPerTask / std::max<int64_t>(item.dim, 1), 1, 4096);
  std::atomic<int64_t> written{0};
  for_each_task((end - begin + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t first = begin + task * rows_per_task;
    written += cpu_kernels().catch_up(item, rows, first, std::min(first + rows_per_task, end));
  });
  if (written > 0) builder.finish();
}

const CatchUpRegistration catch_up_registration(c10::DeviceType::CPU, catch_up);

const DeviceRegistration registration(c10::DeviceType::CPU, [](const StepContext& context) {
  return std::unique_ptr<DeviceStep>(std::make_unique<CpuStep>(context));
});

}  // namespace
}  // namespace tiger_ext
