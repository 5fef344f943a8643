// SPDX-License-Identifier: Apache-2.0
#include "step/item_builder.h"

#include <ATen/Functions.h>

#include "step/checks.h"

namespace tiger_ext {
namespace {

// Same memory order: equal strides wherever a stride means anything.
bool same_order(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  return true;
}

// Any element order will do as long as all tensors share it and it leaves no holes.
at::Tensor shared_order(const at::Tensor& param) {
  if (param.is_non_overlapping_and_dense()) return param;
  return at::empty(param.sizes(), param.options().device(at::kMeta));
}

}  // namespace

bool has_block_order(const Update& u) {
  const at::Tensor order = shared_order(u.param);
  return u.states[0].sizes() == order.sizes() &&
         same_order(order.sizes(), u.states[0].strides(), order.strides());
}

void ItemBuilder::add(const Update& u, const double* lr, int64_t* step) {
  for (int k = 0; k < rule_info(u.rule.kind).states; ++k) written_.push_back(u.states[k]);
  written_.push_back(u.param);
  if (u.step.defined()) written_.push_back(u.step);
  if (u.window.defined()) written_.push_back(u.window);
  if (u.last_step.defined()) written_.push_back(u.last_step);
  if (u.scale.defined()) written_.push_back(u.scale);
  if (u.row_moment.defined()) written_.push_back(u.row_moment);
  const RuleUse rule{shared_rule(u.rule),
                     lr,
                     step,
                     u.window.defined() ? u.window.mutable_data_ptr<int32_t>() : nullptr,
                     u.last_step.defined() ? u.last_step.mutable_data_ptr<int32_t>() : nullptr,
                     u.last_step.defined() ? u.last_step.numel() : 0,
                     rounding_of(u)};
  if ((u.indices.defined() ? u.indices.size(1) : u.param.numel()) == 0) idle_.push_back(rule);
  else if (u.indices.defined()) add_rows(u, rule);
  else if (goes_by_rows(u)) add_direct(u, rule);
  else add_dense(u, rule);
}

void ItemBuilder::start() const {
  for (const auto& [target, source] : late_copies_) source.copy_(target);
}

void ItemBuilder::finish() const {
  for (const auto& [target, source] : copy_back_) target.copy_(source);
  for (const at::Tensor& t : written_)
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// A tensor that the kernels write, in the element order of `order`: itself, or a copy that is
// written back at the end.
Stream ItemBuilder::writable(const Update& u, const at::Tensor& t, const at::Tensor& order,
                             Storage storage) {
  if (t.is_same(order) || same_order(t.sizes(), t.strides(), order.strides()))
    return {t.mutable_data_ptr(), storage};
  const at::Tensor copy = at::empty_strided(t.sizes(), order.strides(), t.options());
  copy.copy_(t);
  copy_back_.emplace_back(t, copy);
  late_copies_.emplace_back(t, copy);
  return {copy.mutable_data_ptr(), storage};
}

void ItemBuilder::add_dense(const Update& u, RuleUse rule) {
  const at::Tensor order = shared_order(u.param);
  DenseItem item;
  item.rule = rule;
  item.numel = u.param.numel();
  item.param = writable(u, u.param, order, storage_of(u, u.param, "the parameter"));
  for (int k = 0; k < rule_info(u.rule.kind).states; ++k)
    item.states[k] = writable(u, u.states[k], order, state_storage(u, k));
  if (u.scale.defined()) item.scales = u.scale.mutable_data_ptr<float>();
  if (u.grad.defined()) {
    at::Tensor grad = u.grad;
    if (!same_order(grad.sizes(), grad.strides(), order.strides()))
      grad = at::empty_strided(grad.sizes(), order.strides(), grad.options()).copy_(grad);
    kept_.push_back(grad);
    item.grad = {const_cast<void*>(grad.const_data_ptr()), storage_of(u, grad, "the gradient")};
  }
  dense_.push_back(item);
  dense_places_.push_back({u.group, u.position});
}

// A table without its gradient.
RowsItem ItemBuilder::rows_item(const Update& u, RuleUse rule, int64_t sparse_dim) {
  RowsItem item;
  item.rule = rule;
  item.rows = 1;
  for (int64_t d = 0; d < sparse_dim; ++d) item.rows *= u.param.size(d);
  item.dim = 1;
  for (int64_t d = sparse_dim; d < u.param.dim(); ++d) item.dim *= u.param.size(d);
  item.param = {u.param.mutable_data_ptr(), storage_of(u, u.param, "the parameter")};
  item.param_layout = row_layout(u.param, sparse_dim);
  for (int k = 0; k < rule_info(u.rule.kind).states; ++k) {
    item.states[k] = {u.states[k].mutable_data_ptr(), state_storage(u, k)};
    item.state_layouts[k] = row_layout(u.states[k], sparse_dim);
  }
  if (u.scale.defined()) item.scales = u.scale.mutable_data_ptr<float>();
  if (u.row_moment.defined()) item.row_moment = u.row_moment.mutable_data_ptr();
  return item;
}

void ItemBuilder::add_rows(const Update& u, RuleUse rule) {
  const int64_t sparse_dim = u.indices.size(0);
  RowsItem item = rows_item(u, rule, sparse_dim);
  item.entries = u.indices.size(1);
  if (!rows_.empty()) {
    item.first_row = rows_.back().first_row + rows_.back().rows + 1;
    item.first_entry = rows_.back().first_entry + rows_.back().entries;
  }
  if (u.values.defined()) {
    at::Tensor values = u.values;
    if (!values.is_contiguous() && row_layout(values, 1).inner) values = values.contiguous();
    kept_.push_back(values);
    item.values = {const_cast<void*>(values.const_data_ptr()),
                   storage_of(u, values, "the gradient")};
    item.value_stride = values.stride(0);
  }
  const at::Tensor indices = u.indices.to(at::kLong);
  kept_.push_back(indices);
  rows_.push_back(item);
  indices_.push_back({indices.const_data_ptr<int64_t>(), indices.stride(0), indices.stride(1),
                      sparse_dim, numbers(u.param.sizes().slice(0, sparse_dim)), u.coalesced});
  row_places_.push_back({u.group, u.position});
}

void ItemBuilder::add_table(const Update& u) {
  const RuleUse rule{
      shared_rule(u.rule), nullptr,       nullptr, nullptr, u.last_step.mutable_data_ptr<int32_t>(),
      u.last_step.numel(), rounding_of(u)};
  for (int k = 0; k < rule_info(u.rule.kind).states; ++k) written_.push_back(u.states[k]);
  written_.push_back(u.param);
  written_.push_back(u.last_step);
  if (u.scale.defined()) written_.push_back(u.scale);
  if (u.row_moment.defined()) written_.push_back(u.row_moment);
  RowsItem item = rows_item(u, rule, u.last_step.dim());
  if (u.scale.defined() && !has_row_scales(u)) item.block_scales = u.scale.numel();
  item.direct = true;
  item.entries = item.rows;
  direct_.push_back(item);
  direct_places_.push_back({u.group, u.position});
}

void ItemBuilder::add_direct(const Update& u, RuleUse rule) {
  const int64_t sparse_dim = row_dims(u);
  RowsItem item = rows_item(u, rule, sparse_dim);
  item.direct = true;
  item.entries = item.rows;
  if (u.grad.defined()) {
    at::Tensor grad = u.grad;
    // Several dimensions of rows have one distance only if they are contiguous.
    if (sparse_dim > 1 || row_layout(grad, sparse_dim).inner) grad = grad.contiguous();
    kept_.push_back(grad);
    item.values = {const_cast<void*>(grad.const_data_ptr()), storage_of(u, grad, "the gradient")};
    item.value_stride = sparse_dim > 1 ? item.dim : grad.stride(0);
  }
  if (u.mask.defined()) {
    kept_.push_back(u.mask);
    item.mask = u.mask.const_data_ptr<uint8_t>();
  }
  direct_.push_back(item);
  direct_places_.push_back({u.group, u.position});
}

Rounding ItemBuilder::rounding_of(const Update& u) {
  Rounding rounding;
  rounding.momentum = u.scale.defined();
  rounding.param = u.rule.rounds && u.param.element_size() == 2;
  rounding.seed = u.rule.seed;
  rounding.position = u.rule.first + u.position;
  if (u.step.defined()) rounding.steps = u.step.const_data_ptr<int64_t>();
  return rounding;
}

// Most parameters of a group share one rule.
const RuleParams* ItemBuilder::shared_rule(const RuleParams& rule) {
  if (rules_.empty() || !(rules_.back() == rule)) rules_.push_back(rule);
  return &rules_.back();
}

RowLayout ItemBuilder::row_layout(const at::Tensor& t, int64_t sparse_dim) {
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
  if (!contiguous) {
    layout.inner_dims = t.dim() - sparse_dim;
    layout.inner_sizes = numbers(t.sizes().slice(sparse_dim));
    layout.inner_strides = numbers(t.strides().slice(sparse_dim));
    layout.inner = inner_offsets(t, sparse_dim, expected);
  }
  return layout;
}

const int64_t* ItemBuilder::inner_offsets(const at::Tensor& t, int64_t sparse_dim, int64_t count) {
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

const int64_t* ItemBuilder::numbers(at::IntArrayRef from) {
  numbers_.emplace_back(from.begin(), from.end());
  return numbers_.back().data();
}

}  // namespace tiger_ext
