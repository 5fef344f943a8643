// SPDX-License-Identifier: Apache-2.0
//
// Every argument check of a parameter's update, shared by all devices. Messages say what was got
// and what was expected; the caller puts the parameter's name in front.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

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

inline void check_device(const Update& u, const at::Tensor& t, const char* what) {
  if (t.device() != u.param.device())
    refuse(u, what, " is on device ", t.device(), ", the parameter is on ", u.param.device());
  if (t.layout() != at::kStrided)
    refuse(u, what, " has layout ", t.layout(), ", expected ", at::kStrided);
}

// A state with a number for each row, or one for the whole parameter.
inline void check_row_state(const Update& u, const at::Tensor& t, const char* name) {
  if (t.defined() &&
      !(t.scalar_type() == at::kInt && t.is_contiguous() && t.device() == u.param.device() &&
        t.dim() <= u.param.dim() && t.sizes() == u.param.sizes().slice(0, t.dim())))
    refuse(u, "the state ", name, " must be a contiguous int32 tensor on ", u.param.device(),
           " of the parameter's first dimensions, got ", t.scalar_type(), " ", t.sizes(), " on ",
           t.device());
}

inline void check_update(const Update& u) {
  const at::Tensor& param = u.param;
  check_device(u, param, "the parameter");
  storage_of(u, param, "the parameter");
  if (at::has_internal_overlap(param) == at::MemOverlap::Yes)
    refuse(u, "the parameter, of sizes ", param.sizes(), " and strides ", param.strides(),
           ", has several elements in the same memory (expanded?) and cannot be updated in place");

  const RuleInfo& rule = rule_info(u.rule.kind);
  for (int k = 0; k < rule.states; ++k) {
    const at::Tensor& state = u.states[k];
    check_device(u, state, rule.state_names[k]);
    storage_of(u, state, rule.state_names[k]);
    if (state.sizes() != param.sizes())
      refuse(u, "the state ", rule.state_names[k], " has shape ", state.sizes(),
             ", the parameter has shape ", param.sizes());
    if (at::has_internal_overlap(state) == at::MemOverlap::Yes)
      refuse(u, "the state ", rule.state_names[k], " has several elements in the same memory");
  }
  const bool steps = u.grad.defined() || u.indices.defined();
  if (rule.counts_steps && steps &&
      !(u.step.defined() && u.step.scalar_type() == at::kLong && u.step.numel() == 1 &&
        u.step.device() == param.device()))
    refuse(u, "the state step must be one int64 element on ", param.device());

  check_row_state(u, u.window, "window");
  check_row_state(u, u.last_step, "last_step");
  if (u.rule.touched == Touched::kMasked && u.grad.defined() &&
      !(u.mask.defined() && u.mask.scalar_type() == at::kByte && u.mask.is_contiguous() &&
        u.mask.device() == param.device() && u.mask.numel() == param.size(0)))
    refuse(u, "the mask of touched rows must be a contiguous uint8 tensor of ", param.size(0),
           " elements on ", param.device());

  if (u.grad.defined()) {
    check_device(u, u.grad, "the gradient");
    storage_of(u, u.grad, "the gradient");
    if (u.grad.sizes() != param.sizes())
      refuse(u, "the gradient has shape ", u.grad.sizes(), ", the parameter has shape ",
             param.sizes());
    return;
  }
  if (!u.indices.defined()) return;  // no gradient: the rows are those of the window
  check_device(u, u.indices, "the gradient's indices tensor");
  if (u.indices.scalar_type() != at::kLong && u.indices.scalar_type() != at::kInt)
    refuse(u, "the gradient's indices have dtype ", u.indices.scalar_type(),
           ", expected int64 or int32");
  if (!u.values.defined()) {
    if (u.indices.dim() != 2 || u.indices.size(0) < 1 || u.indices.size(0) > param.dim())
      refuse(u, "the list of rows has shape ", u.indices.sizes(), ", expected [row_dims, entries]");
    return;
  }
  check_device(u, u.values, "the gradient's values tensor");
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

}  // namespace tiger_ext
