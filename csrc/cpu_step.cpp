// SPDX-License-Identifier: Apache-2.0
//
// A step on the CPU: turns tensors into the plain items of the two roads, whatever their strides,
// and runs the roads.
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <deque>
#include <memory>
#include <vector>

#include "checks.h"
#include "roads_cpu.h"
#include "row_plan_cpu.h"
#include "step.h"

namespace tiger_ext {
namespace {

// Same memory order: equal strides wherever a stride means anything.
bool same_order(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  return true;
}

class CpuStep final : public DeviceStep {
 public:
  CpuStep() { cpu_kernels(); }  // a wrong TIGER_EXT_CPU_ISA shows before anything is written

  void add(const Update& u) override {
    check_update(u);
    for (int k = 0; k < rule_names(u.rule.kind).states; ++k) written_.push_back(u.states[k]);
    written_.push_back(u.param);
    if (u.step.defined()) {
      counters_.push_back(u.step);
      written_.push_back(u.step);
    }
    if (u.grad.defined()) add_dense(u);
    else if (u.values.size(0) > 0) add_rows(u);
  }

  void prepare() override {
    dense_road_.prepare(dense_);
    if (rows_.empty()) return;
    const BadIndex bad = plan_rows(rows_, indices_, scratch_, sorted_);
    if (bad.item < 0) return rows_road_.prepare(rows_, sorted_, scratch_);
    const RowIndices& ix = indices_[bad.item];
    const int64_t index = ix.data[bad.dimension * ix.dim_stride + bad.entry * ix.entry_stride];
    throw UpdateError(
        UpdateError::Kind::kIndex, row_updates_[bad.item],
        c10::str("the gradient's entry ", bad.entry, " has row index ", index, " in dimension ",
                 bad.dimension, ", out of range for ", ix.sizes[bad.dimension], " rows"));
  }

  void apply() override {
    const at::NoGradGuard no_grad;
    dense_road_.run();
    rows_road_.run();
    for (const auto& [target, source] : copy_back_) target.copy_(source);
    for (const at::Tensor& counter : counters_) ++*counter.mutable_data_ptr<int64_t>();
    for (const at::Tensor& t : written_)
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }

 private:
  // A tensor that the kernels write, in the element order of `order`: itself, or a copy that is
  // written back at the end.
  Stream writable(const Update& u, const at::Tensor& t, const at::Tensor& order, const char* what) {
    const Storage storage = storage_of(u, t, what);
    if (t.is_same(order) || same_order(t.sizes(), t.strides(), order.strides()))
      return {t.mutable_data_ptr(), storage};
    const at::Tensor copy = at::empty_strided(t.sizes(), order.strides(), t.options());
    copy.copy_(t);
    copy_back_.emplace_back(t, copy);
    return {copy.mutable_data_ptr(), storage};
  }

  void add_dense(const Update& u) {
    if (u.param.numel() == 0) return;
    // Any element order will do as long as all tensors share it and it leaves no holes.
    at::Tensor order = u.param;
    if (!order.is_non_overlapping_and_dense())
      order = at::empty(u.param.sizes(), u.param.options().device(at::kMeta));
    DenseItem item;
    item.rule = shared_rule(u.rule);
    item.numel = u.param.numel();
    item.param = writable(u, u.param, order, "the parameter");
    for (int k = 0; k < rule_names(u.rule.kind).states; ++k)
      item.states[k] = writable(u, u.states[k], order, "the state");
    at::Tensor grad = u.grad;
    if (!same_order(grad.sizes(), grad.strides(), order.strides()))
      grad = at::empty_strided(grad.sizes(), order.strides(), grad.options()).copy_(grad);
    kept_.push_back(grad);
    item.grad = {const_cast<void*>(grad.const_data_ptr()), storage_of(u, grad, "the gradient")};
    dense_.push_back(item);
  }

  void add_rows(const Update& u) {
    const int64_t sparse_dim = u.indices.size(0);
    RowsItem item;
    item.rule = shared_rule(u.rule);
    item.rows = 1;
    for (int64_t d = 0; d < sparse_dim; ++d) item.rows *= u.param.size(d);
    item.dim = 1;
    for (int64_t d = sparse_dim; d < u.param.dim(); ++d) item.dim *= u.param.size(d);
    item.entries = u.values.size(0);
    if (!rows_.empty()) {
      item.first_row = rows_.back().first_row + rows_.back().rows;
      item.first_entry = rows_.back().first_entry + rows_.back().entries;
    }

    item.param = {u.param.mutable_data_ptr(), storage_of(u, u.param, "the parameter")};
    item.param_layout = row_layout(u.param, sparse_dim);
    for (int k = 0; k < rule_names(u.rule.kind).states; ++k) {
      item.states[k] = {u.states[k].mutable_data_ptr(), storage_of(u, u.states[k], "the state")};
      item.state_layouts[k] = row_layout(u.states[k], sparse_dim);
    }

    at::Tensor values = u.values;
    if (!values.is_contiguous() && row_layout(values, 1).inner) values = values.contiguous();
    kept_.push_back(values);
    kept_.push_back(u.indices);
    item.values = {const_cast<void*>(values.const_data_ptr()),
                   storage_of(u, values, "the gradient")};
    item.value_stride = values.stride(0);
    rows_.push_back(item);
    indices_.push_back({u.indices.const_data_ptr<int64_t>(), u.indices.stride(0),
                        u.indices.stride(1), sparse_dim,
                        numbers(u.param.sizes().slice(0, sparse_dim))});
    row_updates_.push_back({});  // for messages only: no tensors
    row_updates_.back().group = u.group;
    row_updates_.back().position = u.position;
  }

  // Most parameters of a group share one rule.
  const RuleParams* shared_rule(const RuleParams& rule) {
    if (rules_.empty() || !(rules_.back() == rule)) rules_.push_back(rule);
    return &rules_.back();
  }

  RowLayout row_layout(const at::Tensor& t, int64_t sparse_dim) {
    RowLayout layout;
    int64_t span = 0;  // of the dimensions inside, once there are any
    for (int64_t d = sparse_dim - 1; d >= 0; --d) {
      if (t.size(d) == 1) continue;
      if (span == 0) {
        layout.row_stride = span = t.stride(d);
      } else if (t.stride(d) != span) {
        layout.dims = sparse_dim;
        layout.sizes = numbers(t.sizes().slice(0, sparse_dim));
        layout.strides = numbers(t.strides().slice(0, sparse_dim));
        break;
      }
      span *= t.size(d);
    }
    int64_t expected = 1;
    bool contiguous = true;
    for (int64_t d = t.dim() - 1; d >= sparse_dim; --d) {
      contiguous = contiguous && (t.size(d) == 1 || t.stride(d) == expected);
      expected *= t.size(d);
    }
    if (!contiguous) layout.inner = inner_offsets(t, sparse_dim, expected);
    return layout;
  }

  const int64_t* inner_offsets(const at::Tensor& t, int64_t sparse_dim, int64_t count) {
    std::vector<int64_t> offsets(count);
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i;
      for (int64_t d = t.dim() - 1; d >= sparse_dim; --d) {
        offsets[i] += rest % t.size(d) * t.stride(d);
        rest /= t.size(d);
      }
    }
    return numbers(offsets);
  }

  const int64_t* numbers(at::IntArrayRef from) {
    numbers_.emplace_back(from.begin(), from.end());
    return numbers_.back().data();
  }

  std::deque<RuleParams> rules_;
  std::vector<DenseItem> dense_;
  std::vector<RowsItem> rows_;
  std::vector<RowIndices> indices_;
  std::vector<Update> row_updates_;
  std::deque<std::vector<int64_t>> numbers_;  // what the layouts point to
  std::vector<at::Tensor> kept_;              // inputs that must outlive the step
  std::vector<at::Tensor> written_;
  std::vector<at::Tensor> counters_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copy_back_;
  Scratch scratch_;
  SortedEntries sorted_;
  DenseRoad dense_road_;
  RowsRoad rows_road_;
};

const DeviceRegistration registration(c10::DeviceType::CPU, []() -> std::unique_ptr<DeviceStep> {
  return std::make_unique<CpuStep>();
});

}  // namespace
}  // namespace tiger_ext
