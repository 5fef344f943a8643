// SPDX-License-Identifier: Apache-2.0
//
// Every argument check of a parameter's update, shared by all devices. Messages say what was got
// and what was expected; the caller puts the parameter's name in front.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include "rules/rule_list.h"
#include "rules/rounding.h"
#include "rules/storage.h"
#include "step/step.h"

namespace tiger_ext {

template <typename... Args>
[[noreturn]] void refuse(const Update& u, const Args&... args) {
  throw UpdateError(UpdateError::Kind::kRuntime, {u.group, u.position}, c10::str(args...));
}

inline bool is_storage_type(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

inline Storage storage_of(const Update& u, const at::Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Storage::kFloat32;
    case at::kDouble:
      return Storage::kFloat64;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kFloat16;
    default:
      refuse(u, what, " has dtype ", t.scalar_type(),
             ", expected one of float32, float64, bfloat16, float16");
  }
}

// Whether the tensor's memory is to hold its elements as they are.
inline bool is_plain(const at::Tensor& t) {
  const auto* impl = t.unsafeGetTensorImpl();
  return !impl->is_python_dispatch() && !t.is_neg() && !t._is_zerotensor() && !t.is_nested() &&
         !t.is_quantized();
}

// Whether the memory of a plain strided tensor is as large as its sizes and strides say. It is not
// where a storage was resized since.
inline bool holds_its_elements(const at::Tensor& t) {
  const int64_t count = t.numel();
  if (count == 0) return true;
  int64_t last = t.storage_offset() + count - 1;
  if (!t.is_contiguous()) {
    last = t.storage_offset();
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  }
  return static_cast<size_t>(last + 1) * t.element_size() <= t.storage().nbytes();
}

inline void check_memory(const Update& u, const at::Tensor& t, const char* what) {
  if (t.device() != u.param.device())
    refuse(u, what, " is on device ", t.device(), ", the parameter is on ", u.param.device());
  if (t.layout() != at::kStrided)
    refuse(u, what, " has layout ", t.layout(), ", expected ", at::kStrided);
  if (!is_plain(t))
    refuse(u, what, " is a view or subclass whose memory does not hold its elements as they are");
  if (!holds_its_elements(t))
    refuse(u, what, " of sizes ", t.sizes(), " and strides ", t.strides(), " has only ",
           t.storage().nbytes(), " bytes of memory");
}

// Whether a state is contiguous numbers of this type beside the parameter.
inline bool is_list(const Update& u, const at::Tensor& t, at::ScalarType type) {
  return t.layout() == at::kStrided && is_plain(t) && t.scalar_type() == type &&
         t.is_contiguous() && t.device() == u.param.device() && holds_its_elements(t);
}

// Whether a state is one with a number for each row, of any first dimensions, or one for the whole
// parameter.
inline bool is_row_state(const Update& u, const at::Tensor& t, at::ScalarType type = at::kInt) {
  return is_list(u, t, type) && t.dim() <= u.param.dim() &&
         t.sizes() == u.param.sizes().slice(0, t.dim());
}

inline void check_row_state(const Update& u, const at::Tensor& t, const char* name) {
  if (t.defined() && !is_row_state(u, t))
    refuse(u, "the state ", name, " must be a contiguous int32 tensor on ", u.param.device(),
           " of the parameter's first dimensions, got ", t.scalar_type(), " ", t.sizes(), " on ",
           t.device());
}

// Where the update goes by rows, each of them has a number in the state.
inline void check_rows_of_state(const Update& u, const at::Tensor& t, const char* name,
                                int64_t row_dims) {
  if (t.defined() && t.sizes() != u.param.sizes().slice(0, row_dims))
    refuse(u, "the state ", name, " has shape ", t.sizes(), ", expected one number a row, ",
           u.param.sizes().slice(0, row_dims));
}

// The type of state k; int8 has scales.
inline Storage state_storage(const Update& u, int k) {
  const bool scaled = k == 0 && u.scale.defined();
  if (scaled && u.states[k].scalar_type() == at::kChar) return Storage::kInt8;
  if (scaled) refuse(u, "the state has scales, but is ", u.states[k].scalar_type());
  return storage_of(u, u.states[k], "the state");
}

inline void check_scale(const Update& u) {
  if (!u.scale.defined()) return;
  const int64_t blocks = (u.param.numel() + kRoundingBlock - 1) / kRoundingBlock;
  const bool by_block =
      u.scale.dim() >= 2 && u.scale.size(0) == blocks && u.scale.numel() == blocks;
  if (!is_list(u, u.scale, at::kFloat) || !(has_row_scales(u) || by_block))
    refuse(u, "the state ", rule_info(u.rule.kind).state_names[0],
           "_scale must be a contiguous float32 tensor on ", u.param.device(), ", one a row or [",
           blocks, ", 1], got ", u.scale.scalar_type(), " ", u.scale.sizes(), " on ",
           u.scale.device());
}

inline void check_states(const Update& u) {
  const at::Tensor& param = u.param;
  check_memory(u, param, "the parameter");
  storage_of(u, param, "the parameter");
  if (at::has_internal_overlap(param) == at::MemOverlap::Yes)
    refuse(u, "the parameter, of sizes ", param.sizes(), " and strides ", param.strides(),
           ", has several elements in the same memory (expanded?) and cannot be updated in place");

  const RuleInfo& rule = rule_info(u.rule.kind);
  for (int k = 0; k < rule.states; ++k) {
    const at::Tensor& state = u.states[k];
    check_memory(u, state, rule.state_names[k]);
    state_storage(u, k);
    if (state.sizes() != param.sizes())
      refuse(u, "the state ", rule.state_names[k], " has shape ", state.sizes(),
             ", the parameter has shape ", param.sizes());
    if (at::has_internal_overlap(state) == at::MemOverlap::Yes)
      refuse(u, "the state ", rule.state_names[k], " has several elements in the same memory");
  }
  check_scale(u);
  if (rule.row_state_name) {
    const auto type = param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (!(u.row_moment.defined() && u.row_moment.dim() > 0 && is_row_state(u, u.row_moment, type)))
      refuse(u, "the state ", rule.row_state_name, " must be a contiguous ", type, " tensor on ",
             param.device(), " of the parameter's first dimensions, one number a row");
  }
  const bool steps = u.grad.defined() || u.indices.defined();
  const bool counts = rule.counts_steps || u.rule.counts_roundings() || u.scale.defined();
  if (u.step.defined() ? !(u.step.scalar_type() == at::kLong && u.step.numel() == 1 &&
                           u.step.device() == param.device() && u.step.layout() == at::kStrided &&
                           is_plain(u.step) && holds_its_elements(u.step))
                       : counts && steps)
    refuse(u, "the state step must be one int64 element on ", param.device());

  check_row_state(u, u.window, "window");
  check_row_state(u, u.last_step, "last_step");
}

inline void check_gradient(const Update& u) {
  const at::Tensor& param = u.param;
  if (u.rule.touched == Touched::kMasked && u.grad.defined() &&
      !(u.mask.defined() && u.mask.layout() == at::kStrided && is_plain(u.mask) &&
        u.mask.scalar_type() == at::kByte && u.mask.is_contiguous() &&
        u.mask.device() == param.device() && u.mask.numel() == param.size(0) &&
        holds_its_elements(u.mask)))
    refuse(u, "the mask of touched rows must be a contiguous uint8 tensor of ", param.size(0),
           " elements on ", param.device());

  if (u.grad.defined()) {
    check_memory(u, u.grad, "the gradient");
    storage_of(u, u.grad, "the gradient");
    if (u.grad.sizes() != param.sizes())
      refuse(u, "the gradient has shape ", u.grad.sizes(), ", the parameter has shape ",
             param.sizes());
    return;
  }
  if (!u.indices.defined()) return;  // no gradient: the rows are those of the window
  check_memory(u, u.indices, "the gradient's indices tensor");
  if (u.indices.scalar_type() != at::kLong && u.indices.scalar_type() != at::kInt)
    refuse(u, "the gradient's indices have dtype ", u.indices.scalar_type(),
           ", expected int64 or int32");
  if (!u.values.defined()) {
    if (u.indices.dim() != 2 || u.indices.size(0) < 1 || u.indices.size(0) > param.dim())
      refuse(u, "the list of rows has shape ", u.indices.sizes(), ", expected [row_dims, entries]");
    return;
  }
  check_memory(u, u.values, "the gradient's values tensor");
  storage_of(u, u.values, "the gradient");
  if (u.indices.dim() != 2 || u.values.dim() < 1)
    refuse(u, "the gradient's indices have shape ", u.indices.sizes(), " and its values ",
           u.values.sizes(), ", expected [sparse_dim, nnz] and [nnz, ...]");
  const int64_t sparse_dim = u.indices.size(0);
  if (sparse_dim < 1 || sparse_dim > param.dim() || u.indices.size(1) != u.values.size(0) ||
      u.values.sizes().slice(1) != param.sizes().slice(sparse_dim))
    refuse(u, "the gradient has indices of shape ", u.indices.sizes(), " and values of shape ",
           u.values.sizes(), ", the parameter has shape ", param.sizes());
}

inline void check_update(const Update& u) {
  check_states(u);
  check_gradient(u);
  if (u.lr.defined() && u.lr.numel() != 1)
    refuse(u, "the learning rate has ", u.lr.numel(), " elements, expected one");
  const RuleParams& rule = u.rule;
  const bool windowed = rule.window != 0 || !rule.adds;
  if (windowed && (rule.window < 1 || !u.window.defined() || !rule_info(rule.kind).directed))
    refuse(u, "the accumulation window has number ", rule.window,
           u.window.defined() ? "" : " and the parameter no state window",
           ", expected one from 1 on, of Tiger");
  // What the kernels index by row has a number for each row that they take.
  if (!u.indices.defined() && !goes_by_rows(u)) return;
  int64_t dims = u.indices.defined() ? u.indices.size(0) : row_dims(u);
  // A strided gradient's touched rows are those of the first dimension.
  if (rule.touched != Touched::kAll && u.grad.defined()) dims = 1;
  check_rows_of_state(u, u.window, "window", dims);
  check_rows_of_state(u, u.last_step, "last_step", dims);
  check_rows_of_state(u, u.row_moment, "exp_avg_sq", dims);
  check_rows_of_state(u, u.scale, "exp_avg_scale", dims);
}

// A table of which rows [begin, end), or those of `ids`, are to be brought up to date.
inline void check_table(const Update& u, const at::Tensor& ids, int64_t begin, int64_t end) {
  check_states(u);
  if (!u.last_step.defined()) refuse(u, "the parameter has no state last_step");
  const int64_t dims = u.last_step.dim();
  check_rows_of_state(u, u.row_moment, "exp_avg_sq", dims);
  if (dims > 0 || has_row_scales(u)) check_rows_of_state(u, u.scale, "exp_avg_scale", dims);
  if (!ids.defined() && !(0 <= begin && begin <= end && end <= u.last_step.numel()))
    refuse(u, "rows ", begin, " to ", end, " are out of range for ", u.last_step.numel(), " rows");
}

}  // namespace tiger_ext
