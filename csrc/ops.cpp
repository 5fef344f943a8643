// SPDX-License-Identifier: Apache-2.0
//
// All schemas, their implementation over DeviceStep, and the Python module with build information.
// The ops are what torch.compile and other callers of the dispatcher see; each is one step over the
// parameters in its lists, all or nothing.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <map>
#include <optional>

#include "checks.h"
#include "eager.h"
#include "huge_pages.h"
#include "kernels_cpu.h"
#include "row_norms.h"
#include "step.h"

namespace tiger_ext {
namespace {

using at::TensorList;

// The lists of one op call. An empty list stands for "the rule has none".
struct Lists {
  TensorList params, grads, indices, values, states0, states1, steps;
};

void check_length(TensorList list, const Lists& lists, const char* name) {
  TORCH_CHECK_VALUE(list.size() == lists.params.size(), "tiger_ext: ", name, " has ", list.size(),
                    " tensors, params has ", lists.params.size());
}

void run(const Lists& lists, RuleParams rule) {
  const RuleNames& names = rule_names(rule.kind);
  if (lists.values.empty()) {
    check_length(lists.grads, lists, "grads");
  } else {
    check_length(lists.indices, lists, "indices");
    check_length(lists.values, lists, "values");
  }
  check_length(lists.states0, lists, names.state_names[0]);
  if (names.states > 1) check_length(lists.states1, lists, names.state_names[1]);
  if (names.counts_steps) check_length(lists.steps, lists, "steps");

  // Faults of a device's kernels are thrown by the next call of any op.
  static Faults* const faults = new Faults();
  StepContext context;
  context.faults = faults;
  std::map<c10::DeviceType, std::unique_ptr<DeviceStep>> devices;
  try {
    faults->raise();
    for (size_t i = 0; i < lists.params.size(); ++i) {
      Update u;
      u.param = lists.params[i];
      if (lists.values.empty()) {
        u.grad = lists.grads[i];
      } else {
        u.indices = lists.indices[i];
        u.values = lists.values[i];
      }
      u.states[0] = lists.states0[i];
      if (names.states > 1) u.states[1] = lists.states1[i];
      u.rule = rule;
      u.position = static_cast<int>(i);
      if (names.counts_steps) u.step = lists.steps[i];
      std::unique_ptr<DeviceStep>& step = devices[u.param.device().type()];
      if (!step) {
        const DeviceStepFactory make = device_step_factory(u.param.device().type());
        TORCH_CHECK(make, "tiger_ext: this build has no kernels for ", u.param.device());
        step = make(context);
      }
      step->add(u);
    }
    for (const auto& [type, step] : devices) step->prepare();
  } catch (const UpdateError& e) {
    const std::string message = c10::str("tiger_ext: params[", e.place.position, "]: ", e.what());
    if (e.kind == UpdateError::Kind::kIndex) TORCH_CHECK_INDEX(false, message);
    TORCH_CHECK(false, message);
  }
  for (const auto& [type, step] : devices) step->apply();
}

RuleParams rule_of(RuleKind kind, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, double grad_scale) {
  RuleParams r;
  r.kind = kind;
  r.lr = lr;
  r.beta1 = beta1;
  r.beta2 = beta2;
  r.eps = eps;
  r.weight_decay = weight_decay;
  r.grad_factor = (maximize ? -1.0 : 1.0) / grad_scale;
  return r;
}

RuleParams sign_momentum(double lr, double beta1, double beta2, double weight_decay, bool maximize,
                         double grad_scale) {
  return rule_of(RuleKind::kSignMomentum, lr, beta1, beta2, 0.0, weight_decay, maximize,
                 grad_scale);
}

RuleParams adamw(double lr, double beta1, double beta2, double eps, double weight_decay,
                 bool maximize, double grad_scale) {
  const RuleKind kind = beta1 == 0.0 ? RuleKind::kAdamWWithoutMoment1 : RuleKind::kAdamW;
  return rule_of(kind, lr, beta1, beta2, eps, weight_decay, maximize, grad_scale);
}

void sign_momentum_dense_(TensorList params, TensorList grads, TensorList exp_avgs, double lr,
                          double beta1, double beta2, double weight_decay, bool maximize,
                          double grad_scale) {
  run({params, grads, {}, {}, exp_avgs, {}, {}},
      sign_momentum(lr, beta1, beta2, weight_decay, maximize, grad_scale));
}

void sign_momentum_rows_(TensorList params, TensorList indices, TensorList values,
                         TensorList exp_avgs, double lr, double beta1, double beta2,
                         double weight_decay, bool maximize, double grad_scale) {
  run({params, {}, indices, values, exp_avgs, {}, {}},
      sign_momentum(lr, beta1, beta2, weight_decay, maximize, grad_scale));
}

Lists with_moments(Lists lists, TensorList exp_avgs, TensorList exp_avg_sqs, double beta1) {
  lists.states0 = beta1 == 0.0 ? exp_avg_sqs : exp_avgs;
  lists.states1 = beta1 == 0.0 ? TensorList() : exp_avg_sqs;
  return lists;
}

void adamw_dense_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                  TensorList steps, double lr, double beta1, double beta2, double eps,
                  double weight_decay, bool maximize, double grad_scale) {
  run(with_moments({params, grads, {}, {}, {}, {}, steps}, exp_avgs, exp_avg_sqs, beta1),
      adamw(lr, beta1, beta2, eps, weight_decay, maximize, grad_scale));
}

void adamw_rows_(TensorList params, TensorList indices, TensorList values, TensorList exp_avgs,
                 TensorList exp_avg_sqs, TensorList steps, double lr, double beta1, double beta2,
                 double eps, double weight_decay, bool maximize, double grad_scale) {
  run(with_moments({params, {}, indices, values, {}, {}, steps}, exp_avgs, exp_avg_sqs, beta1),
      adamw(lr, beta1, beta2, eps, weight_decay, maximize, grad_scale));
}

}  // namespace

TORCH_LIBRARY(tiger_ext, m) {
  m.def(
      "sign_momentum_dense_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, *, float "
      "lr, "
      "float beta1, float beta2, float weight_decay, bool maximize=False, float grad_scale=1.0) -> "
      "()");
  m.def(
      "sign_momentum_rows_(Tensor(a!)[] params, Tensor[] indices, Tensor[] values, "
      "Tensor(b!)[] exp_avgs, *, float lr, float beta1, float beta2, float weight_decay, "
      "bool maximize=False, float grad_scale=1.0) -> ()");
  m.def(
      "adamw_dense_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, float lr, float beta1, float beta2, float "
      "eps, "
      "float weight_decay, bool maximize=False, float grad_scale=1.0) -> ()");
  m.def(
      "adamw_rows_(Tensor(a!)[] params, Tensor[] indices, Tensor[] values, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, float lr, float beta1, float beta2, float "
      "eps, "
      "float weight_decay, bool maximize=False, float grad_scale=1.0) -> ()");
}

namespace {

void implement(torch::Library& m) {
  m.impl("sign_momentum_dense_", sign_momentum_dense_);
  m.impl("sign_momentum_rows_", sign_momentum_rows_);
  m.impl("adamw_dense_", adamw_dense_);
  m.impl("adamw_rows_", adamw_rows_);
}

}  // namespace

TORCH_LIBRARY_IMPL(tiger_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tiger_ext, CUDA, m) { implement(m); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of tiger_ext.";
  bind_eager(m);
  bind_row_norms(m);
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = TIGER_EXT_VERSION;
    info["torch"] = TIGER_EXT_BUILT_WITH_TORCH;
    info["compiler"] = __VERSION__;
    info["cuda"] = device_step_factory(c10::DeviceType::CUDA) != nullptr;
    return info;
  });
  m.def(
      "advise_huge_pages",
      [](uintptr_t data, size_t bytes, bool in_use) {
        pybind11::gil_scoped_release release;
        advise_huge_pages(reinterpret_cast<void*>(data), bytes, in_use);
      },
      pybind11::arg("data"), pybind11::arg("bytes"), pybind11::arg("in_use"));
  m.def("cpu_isa", [] { return cpu_kernels().name; });
}

}  // namespace tiger_ext
