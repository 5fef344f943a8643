// SPDX-License-Identifier: Apache-2.0
//
// The ops that torch.compile and other callers of the dispatcher see, two for each family of rules
// (rule_list.h), over DeviceStep; and the Python module with build information. Each call is one
// step over the parameters in its lists, all or nothing. For a family with two state tensors, a
// counter and eps:
//
//     adamw_dense_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,
//                  Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, float lr, float beta1,
//                  float beta2, float eps, float weight_decay, bool maximize=False,
//                  float grad_scale=1.0) -> ()
//     adamw_rows_(Tensor(a!)[] params, Tensor[] indices, Tensor[] values, ...) -> ()
//
// A state that the form of the rule for these numbers does not have is an empty list.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/eager.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels/kernels.h"
#include "rules/rule_list.h"
#include "step/checks.h"
#include "step/row_norms.h"
#include "step/step.h"

namespace tiger_ext {
namespace {

constexpr std::string_view kDense = "_dense_", kRows = "_rows_";

// The rule whose state is the whole of its family's.
struct Family {
  RuleInfo rule;
  std::string name(std::string_view suffix) const { return rule.family + std::string(suffix); }
};

const std::vector<Family>& families() {
  static const auto* const all = [] {
    auto* found = new std::vector<Family>();
    for (int kind = 0; kind < kRuleCount; ++kind) {
      const RuleInfo& info = rule_info(static_cast<RuleKind>(kind));
      if (!info.family) continue;
      Family* same = nullptr;
      for (Family& f : *found)
        if (std::string_view(f.rule.family) == info.family) same = &f;
      if (!same) found->push_back({info});
      else if (info.states > same->rule.states) same->rule = info;
    }
    return found;
  }();
  return *all;
}

// What a list of one state of all parameters is called.
std::string list_of(const char* state) { return std::string(state) + 's'; }

std::string schema_of(const Family& family, std::string_view suffix) {
  std::string s = family.name(suffix) + "(Tensor(a!)[] params, ";
  s += suffix == kRows ? "Tensor[] indices, Tensor[] values" : "Tensor[] grads";
  char alias = 'a';
  const auto written = [&](const std::string& name) {
    s += std::string(", Tensor(") + ++alias + "!)[] " + name;
  };
  for (int k = 0; k < family.rule.states; ++k) written(list_of(family.rule.state_names[k]));
  if (family.rule.counts_steps) written("steps");
  s += ", *, float lr, float beta1, float beta2, ";
  if (family.rule.has_eps) s += "float eps, ";
  return s + "float weight_decay, bool maximize=False, float grad_scale=1.0) -> ()";
}

// The arguments of one call.
class Call {
 public:
  Call(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : arguments_(op.schema().arguments()), values_(torch::jit::last(stack, arguments_.size())) {
    const std::string& name = op.schema().name();  // tiger_ext::adamw_dense_
    rows = name.ends_with(kRows);
    const size_t begin = name.find("::") + 2;
    family = name.substr(begin, name.size() - begin - (rows ? kRows : kDense).size());
  }

  std::vector<at::Tensor> tensors(std::string_view name) const {
    return find(name)->toTensorVector();
  }
  double number(std::string_view name, double otherwise = 0.0) const {
    const c10::IValue* value = find(name);
    return value ? value->toDouble() : otherwise;
  }
  bool flag(std::string_view name) const { return find(name)->toBool(); }

  std::string family;
  bool rows;

 private:
  const c10::IValue* find(std::string_view name) const {
    for (size_t k = 0; k < arguments_.size(); ++k)
      if (arguments_[k].name() == name) return &values_[k];
    return nullptr;
  }

  const std::vector<c10::Argument>& arguments_;
  at::ArrayRef<c10::IValue> values_;
};

// A list of tensors, one of each parameter.
struct TensorColumn {
  std::vector<at::Tensor> tensors;
  at::Tensor Update::* member = nullptr;
  int state = -1;  // if there is no member
};

void run(const Call& call) {
  RuleParams rule;
  rule.lr = call.number("lr");
  rule.beta1 = call.number("beta1");
  rule.beta2 = call.number("beta2");
  rule.eps = call.number("eps");
  rule.weight_decay = call.number("weight_decay");
  rule.grad_factor = (call.flag("maximize") ? -1.0 : 1.0) / call.number("grad_scale");
  rule.kind = kind_for(call.family, rule);
  const RuleInfo& info = rule_info(rule.kind);

  const std::vector<at::Tensor> params = call.tensors("params");
  std::vector<TensorColumn> columns;
  const auto column = [&](const std::string& name, at::Tensor Update::* member, int state = -1) {
    columns.push_back({call.tensors(name), member, state});
    const size_t size = columns.back().tensors.size();
    TORCH_CHECK_VALUE(size == params.size(), "tiger_ext: ", name, " has ", size,
                      " tensors, params has ", params.size());
  };
  if (call.rows) {
    column("indices", &Update::indices);
    column("values", &Update::values);
  } else {
    column("grads", &Update::grad);
  }
  for (int k = 0; k < info.states; ++k) column(list_of(info.state_names[k]), nullptr, k);
  if (info.counts_steps) column("steps", &Update::step);

  // Faults of a device's kernels are thrown by the next call of any op.
  static Faults* const faults = new Faults();
  StepContext context;
  context.faults = faults;
  std::map<c10::DeviceType, std::unique_ptr<DeviceStep>> devices;
  try {
    faults->raise();
    for (size_t i = 0; i < params.size(); ++i) {
      Update u;
      u.param = params[i];
      for (const TensorColumn& c : columns)
        (c.member ? u.*c.member : u.states[c.state]) = c.tensors[i];
      u.rule = rule;
      u.position = static_cast<int>(i);
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

void run_boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run(Call(op, *stack));
  torch::jit::drop(*stack, op.schema().arguments().size());
}

void implement(torch::Library& m) {
  for (const Family& family : families())
    for (const std::string_view suffix : {kDense, kRows})
      m.impl(family.name(suffix).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_boxed>());
}

}  // namespace

TORCH_LIBRARY(tiger_ext, m) {
  for (const Family& family : families())
    for (const std::string_view suffix : {kDense, kRows}) m.def(schema_of(family, suffix).c_str());
}

TORCH_LIBRARY_IMPL(tiger_ext, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(tiger_ext, CUDA, m) { implement(m); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of tiger_ext.";
  bind_eager(m);
  m.def("row_norms", &row_norms, pybind11::arg("grads"), pybind11::arg("p"),
        pybind11::call_guard<pybind11::gil_scoped_release>());
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
      [](uintptr_t data, size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      pybind11::arg("data"), pybind11::arg("bytes"),
      pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("huge_pages_wanted", &huge_pages_wanted);
  m.def(
      "move_to_huge_page",
      [](uintptr_t page) { return move_to_huge_page(reinterpret_cast<void*>(page)); },
      pybind11::arg("page"), pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("cpu_isa", [] { return cpu_kernels().name; });
  m.def("is_recorded", [] { return at::hasCallbacks(); });
  m.def("rule_forms", [] {
    std::map<std::string, std::vector<std::vector<std::string>>> forms;
    for (int kind = 0; kind < kRuleCount; ++kind) {
      const RuleInfo& info = rule_info(static_cast<RuleKind>(kind));
      if (!info.family) continue;
      std::vector<std::string> names(info.state_names, info.state_names + info.states);
      if (info.row_state_name) names.emplace_back(info.row_state_name);
      forms[info.family].push_back(names);
    }
    return forms;
  });
}

}  // namespace tiger_ext
