// SPDX-License-Identifier: Apache-2.0
//
// The eager road into a step. Walks a group's parameters, their gradients and their state in C++:
// for thousands of small tensors the loop in Python, and the boxing of its lists, cost several
// times the arithmetic. Nothing is cached between steps, so tensors may be replaced at any time.
#include "eager.h"

#include <ATen/Functions.h>
#include <ATen/SparseTensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "step.h"

namespace py = pybind11;

namespace tiger_ext {
namespace {

// Whether the tensor's memory holds its elements as they are.
bool plain(const at::Tensor& t) {
  const auto* impl = t.unsafeGetTensorImpl();
  return !impl->is_python_dispatch() && !t.is_neg() && !t._is_zerotensor() && !t.is_nested() &&
         !t.is_quantized();
}

// Gradients that autograd keeps symbolic: zeros without memory, and negated views.
at::Tensor materialized(const at::Tensor& grad) {
  if (grad.layout() != at::kStrided) return grad;
  if (grad._is_zerotensor()) return at::zeros(grad.sizes(), grad.options());
  return grad.is_neg() ? grad.resolve_neg() : grad;
}

class Step {
 public:
  // `faults` must outlive the step.
  Step(Faults& faults, const py::object& grad_scale, const py::object& found_inf) {
    faults.raise();
    context_.faults = &faults;
    if (!grad_scale.is_none()) context_.grad_scale = tensor(grad_scale);
    if (!found_inf.is_none()) context_.found_inf = tensor(found_inf);
  }

  // Adds the parameters of one group that have a gradient; of all, or of those at `positions`.
  // Returns (without_state, not_native): positions of parameters that were not added because their
  // state must be created first, or because no native kernel can update them.
  py::tuple add_group(const py::list& params, const py::dict& state, int group, RuleKind kind,
                      const py::object& lr, double beta1, double beta2, double eps,
                      double weight_decay, bool maximize,
                      const std::optional<std::vector<int64_t>>& positions) {
    const RuleNames& names = rule_names(kind);
    PyObject* keys[kMaxStateTensors] = {};
    for (int k = 0; k < names.states; ++k) keys[k] = interned(names.state_names[k]);
    PyObject* const step_key = interned("step");
    py::list without_state, not_native;
    Update u;
    RuleParams rule{kind, 0.0, beta1, beta2, eps, weight_decay, maximize ? -1.0 : 1.0};
    if (THPVariable_Check(lr.ptr())) u.lr = tensor(lr);
    else rule.lr = lr.cast<double>();
    u.group = group;

    const int64_t count =
        positions ? static_cast<int64_t>(positions->size()) : PyList_GET_SIZE(params.ptr());
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = positions ? (*positions)[n] : n;
      PyObject* object = PyList_GET_ITEM(params.ptr(), i);
      u.param = tensor(object);
      if (!u.param.unsafeGetTensorImpl()->grad().defined()) continue;
      u.grad = materialized(u.param.unsafeGetTensorImpl()->grad());
      DeviceStep* device = device_step(u.param);
      const bool sparse = u.grad.layout() == at::kSparse;
      if (!device || !plain(u.param) || u.param.layout() != at::kStrided ||
          !is_storage_type(u.param.scalar_type()) || !plain(u.grad) ||
          !(sparse || u.grad.layout() == at::kStrided)) {
        not_native.append(i);
        continue;
      }

      u.position = static_cast<int>(i);
      PyObject* own = PyDict_GetItemWithError(state.ptr(), object);
      bool complete = own && PyDict_Check(own);
      for (int k = 0; k < names.states && complete; ++k) complete = read(own, keys[k], u.states[k]);
      if (names.counts_steps && complete) complete = read(own, step_key, u.step);
      if (PyErr_Occurred()) throw py::error_already_set();
      if (!complete) {
        without_state.append(i);
        continue;
      }

      if (sparse) {
        if (u.grad.device() != u.param.device() || u.grad.sizes() != u.param.sizes())
          refuse_shape(u, u.grad);
        const auto* impl = static_cast<const at::SparseTensorImpl*>(u.grad.unsafeGetTensorImpl());
        u.indices = impl->indices();
        u.values = impl->values();
        u.coalesced = impl->coalesced();
        u.grad.reset();
      }
      u.rule = rule;
      device->add(u);
    }
    return py::make_tuple(without_state, not_native);
  }

  void prepare() {
    py::gil_scoped_release release;
    for (const auto& [type, step] : devices_) step->prepare();
  }

  bool cancelled() const {
    for (const auto& [type, step] : devices_)
      if (step->cancelled()) return true;
    return false;
  }

  void apply() {
    py::gil_scoped_release release;
    for (const auto& [type, step] : devices_) step->apply();
  }

 private:
  DeviceStep* device_step(const at::Tensor& t) {
    const c10::DeviceType type = t.device().type();
    if (auto it = devices_.find(type); it != devices_.end()) return it->second.get();
    const DeviceStepFactory make = device_step_factory(type);
    return make ? (devices_[type] = make(context_)).get() : nullptr;
  }

  static const at::Tensor& tensor(py::handle object) {
    if (!THPVariable_Check(object.ptr()))
      throw py::type_error("expected a tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
    return THPVariable_Unpack(object.ptr());
  }

  static PyObject* interned(const char* name) {
    // Few different names, each from a string literal: the addresses identify them.
    static auto* names = new std::map<const char*, PyObject*>();
    PyObject*& object = (*names)[name];
    if (!object) object = PyUnicode_InternFromString(name);
    return object;
  }

  static bool read(PyObject* dict, PyObject* key, at::Tensor& out) {
    PyObject* value = PyDict_GetItemWithError(dict, key);
    if (!value || !THPVariable_Check(value)) return false;
    out = THPVariable_Unpack(value);
    return true;
  }

  static void refuse_shape(const Update& u, const at::Tensor& grad) {
    refuse(u, "the gradient has shape ", grad.sizes(), " on device ", grad.device(),
           ", the parameter has shape ", u.param.sizes(), " on device ", u.param.device());
  }

  StepContext context_;
  std::map<c10::DeviceType, std::unique_ptr<DeviceStep>> devices_;
};

}  // namespace

void bind_eager(py::module_& m) {
  // Arguments: kind of error, group, position, message. tiger_ext.optimizer adds the name.
  static auto* update_error = new py::object(py::reinterpret_steal<py::object>(
      PyErr_NewException("tiger_ext._C.UpdateError", nullptr, nullptr)));
  m.attr("UpdateError") = *update_error;
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const UpdateError& e) {
      const char* kind = e.kind == UpdateError::Kind::kIndex ? "index" : "runtime";
      PyErr_SetObject(update_error->ptr(),
                      py::make_tuple(kind, e.place.group, e.place.position, e.what()).ptr());
    }
  });

  py::enum_<RuleKind>(m, "RuleKind")
      .value("SIGN_MOMENTUM", RuleKind::kSignMomentum)
      .value("ADAMW", RuleKind::kAdamW)
      .value("ADAMW_WITHOUT_MOMENT1", RuleKind::kAdamWWithoutMoment1);

  py::class_<Faults>(m, "Faults").def(py::init<>());
  py::class_<Step>(m, "Step")
      .def(py::init<Faults&, const py::object&, const py::object&>(), py::arg("faults"),
           py::arg("grad_scale"), py::arg("found_inf"), py::keep_alive<1, 2>())
      .def("add_group", &Step::add_group)
      .def("prepare", &Step::prepare)
      .def("cancelled", &Step::cancelled)
      .def("apply", &Step::apply);
}

}  // namespace tiger_ext
