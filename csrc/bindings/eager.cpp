// SPDX-License-Identifier: Apache-2.0
//
// The eager road into a step. Walks a group's parameters, their gradients and their state in C++:
// for thousands of small tensors the loop in Python, and the boxing of its lists, cost several
// times the arithmetic. Nothing is cached between steps, so tensors may be replaced at any time.
#include "bindings/eager.h"

#include <ATen/Functions.h>
#include <ATen/SparseTensorImpl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "step/checks.h"
#include "step/group_history.h"
#include "step/item_builder.h"
#include "step/step.h"

namespace py = pybind11;

namespace tiger_ext {
namespace {

// Gradients, and the values of sparse ones, that autograd keeps symbolic: zeros without memory, and
// negated views.
at::Tensor materialized(const at::Tensor& grad) {
  if (grad.layout() != at::kStrided) return grad;
  if (grad._is_zerotensor()) return at::zeros(grad.sizes(), grad.options());
  return grad.is_neg() ? grad.resolve_neg() : grad;
}

// Strings that are looked up in dicts; few, each from a literal: the addresses identify them.
PyObject* interned(const char* name) {
  static auto* names = new std::map<const char*, PyObject*>();
  PyObject*& object = (*names)[name];
  if (!object) object = PyUnicode_InternFromString(name);
  return object;
}

// The options of a parameter group. Those that only some algorithms have may be missing, and keep
// their value.
class Options {
 public:
  explicit Options(const py::dict& group) : group_(group.ptr()) {}

  PyObject* find(const char* name) const {
    PyObject* found = PyDict_GetItemWithError(group_, interned(name));
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }
  py::handle get(const char* name) const {
    if (PyObject* found = find(name)) return found;
    throw py::key_error(name);
  }

  template <typename T>
  static T number(const char* name, py::handle value) {
    try {
      return value.cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(said(name, value) + ": expected a number");
    }
  }
  template <typename T>
  void number(const char* name, T& value) const {
    if (PyObject* found = find(name)) value = number<T>(name, found);
  }
  // One of `names`, which stand in the order of the enumeration; null is None.
  template <typename Enum, size_t kCount>
  static Enum choice(const char* name, py::handle value, const char* const (&names)[kCount]) {
    for (size_t k = 0; k < kCount; ++k)
      if (names[k] ? PyUnicode_Check(value.ptr()) &&
                         PyUnicode_CompareWithASCIIString(value.ptr(), names[k]) == 0
                   : value.is_none())
        return static_cast<Enum>(k);
    throw py::value_error(said(name, value) + " is unknown");
  }
  template <typename Enum, size_t kCount>
  void choice(const char* name, const char* const (&names)[kCount], Enum& value) const {
    if (PyObject* found = find(name)) value = choice<Enum>(name, found, names);
  }

 private:
  static std::string said(const char* name, py::handle value) {
    return std::string(name) + '=' + py::repr(value).cast<std::string>();
  }

  PyObject* group_;
};

// A group's options for one step, but for the learning rate, by the rule of `family` that fits.
// `first` is the number of its first parameter in the optimizer.
RuleParams make_rule(const std::string& family, const py::dict& group, double direction_scale,
                     int32_t window, int64_t micro_steps, bool adds, int64_t first) {
  const Options options(group);
  RuleParams r;
  const py::handle betas = options.get("betas");
  r.beta1 = Options::number<double>("betas", betas[py::int_(0)]);
  r.beta2 = Options::number<double>("betas", betas[py::int_(-1)]);
  options.number("eps", r.eps);
  r.weight_decay = Options::number<double>("weight_decay", options.get("weight_decay"));
  r.grad_factor = Options::number<bool>("maximize", options.get("maximize")) ? -1.0 : 1.0;
  r.touched =
      Options::choice<Touched>("rows", options.get("rows"), {nullptr, "nonzero", "tracked"});
  r.nonfinite = Options::choice<Nonfinite>("nonfinite", options.get("nonfinite"),
                                           {"propagate", "skip", "shrink", "raise"});
  options.number("shrink_ratio", r.shrink_ratio);
  options.number("shrink_to", r.shrink_to);
  options.choice("scale", {nullptr, "rms", "rms_rows"}, r.scale);
  options.number("rms_floor", r.rms_floor);
  options.choice("direction", {"sign", "clip", "power", "atan"}, r.direction);
  r.direction_scale = direction_scale;
  r.window = window;
  r.micro_steps = static_cast<double>(micro_steps);
  r.adds = adds;
  r.decays = adds;
  r.moves = window == 0 || !adds;
  r.lazy = Options::choice<Lazy>("lazy", options.get("lazy"), {"frozen", "decay", "exact"});
  enum class SecondMoment { kElement, kRow } second_moment = SecondMoment::kElement;
  options.choice("second_moment", {"element", "row"}, second_moment);
  r.row_moment = second_moment == SecondMoment::kRow;
  options.number("stochastic_rounding", r.rounds);
  if (PyObject* dtype = options.find("momentum_dtype"); dtype && THPDtype_Check(dtype))
    r.quantises = reinterpret_cast<THPDtype*>(dtype)->scalar_type == at::kChar;
  options.number("rounding_seed", r.seed);
  r.first = first;
  r.kind = kind_for(family, r);
  return r;
}

// A group's rule for a parameter without rows, which has no moment of rows.
RuleParams without_rows(const RuleParams& group) {
  RuleParams r = group;
  if (!r.row_moment) return r;
  r.row_moment = false;
  r.kind = kind_for(rule_info(r.kind).family, r);
  return r;
}

// Whether a scale or moment has numbers for the rows that an update goes by: `row_dims` dimensions
// make a row, any number of them if it is -1.
bool has_rows(const Update& u, const at::Tensor& t, int64_t row_dims) {
  return row_dims < 0 ? t.dim() > 0
                      : t.dim() == row_dims && t.dim() <= u.param.dim() &&
                            t.sizes() == u.param.sizes().slice(0, row_dims);
}

// Whether what has a number a row has those of the clock.
bool fits_clock(const Update& u) {
  const int64_t dims = u.last_step.dim();
  if (u.row_moment.defined() && u.row_moment.dim() != dims) return false;
  if (!u.scale.defined()) return true;
  return has_row_scales(u) ? u.scale.dim() == dims : dims == 0;
}

// Brings rows of the table at `position` of its group up to date: those of `ids`, or [begin, end).
// Up to the present step, or `until` an earlier one. Returns false if there is no kernel for the
// parameter: those of a device know the present step only.
bool catch_up(const at::Tensor& param, const std::vector<at::Tensor>& states,
              const at::Tensor& last_step, const RuleParams& rule, GroupHistory& history,
              int64_t position, const std::optional<at::Tensor>& ids, int64_t begin, int64_t end,
              const std::optional<int32_t>& until, const std::optional<at::Tensor>& scale) {
  const CatchUpFunction function = catch_up_function(param.device().type());
  if (!function || !history.has(param.device()) || !is_plain(param) ||
      param.layout() != at::kStrided || !is_storage_type(param.scalar_type()) ||
      (until && history_copy_factory(param.device().type())))
    return false;
  Update u;
  u.param = param;
  u.last_step = last_step;
  u.rule = param.dim() < 2 ? without_rows(rule) : rule;
  u.position = static_cast<int>(position);
  const RuleInfo& names = rule_info(u.rule.kind);
  const size_t count = static_cast<size_t>(names.states) + (names.row_state_name ? 1 : 0);
  if (states.size() != count)
    throw py::value_error("catch_up: expected " + std::to_string(count) + " states");
  if (names.row_state_name) u.row_moment = states.back();
  if (scale && names.states > 0) u.scale = *scale;
  if (!fits_clock(u)) return false;
  history.use(u.rule, param.device());
  if (until) GroupHistory::use_until(u.rule, *until);
  for (int k = 0; k < names.states; ++k) u.states[k] = states[k];
  const auto stretches = history.stretches();
  const py::gil_scoped_release release;
  const std::lock_guard lock(history.rows());
  function(u, ids ? *ids : at::Tensor(), begin, end);
  history.note(position, param);
  return true;
}

class Step {
 public:
  // `faults` must outlive the step.
  Step(Faults& faults, const py::object& grad_scale, const py::object& found_inf) {
    faults.raise();
    context_.faults = &faults;
    if (!grad_scale.is_none()) context_.grad_scale = element(grad_scale, "grad_scale");
    if (!found_inf.is_none()) context_.found_inf = element(found_inf, "found_inf");
  }

  // Adds the parameters of one group that have a gradient or, where the rule adds none, a window;
  // of all, or of those at `positions`. `rows` has, by parameter, the mask of its touched rows, or
  // the list of those of its window. `history` is that of a group in a lazy mode. Returns
  // positions:
  //     without_state  not added: the state, or the history there, must be created first
  //     not_native     not added: no native kernel can update the parameter
  //     lagging        added, but has rows that must catch up before `apply`
  //     idle           in a lazy mode, without a gradient: does not train, or has no clock
  //     rewritten      in a lazy mode: others have written to it since the last step
  py::tuple add_group(const py::list& params, const py::dict& state, int group,
                      const RuleParams& group_rule, const py::object& lr, const py::dict& rows,
                      const std::shared_ptr<GroupHistory>& history,
                      const std::optional<std::vector<int64_t>>& positions) {
    PyObject* const scale_key = interned("exp_avg_scale");
    PyObject* const step_key = interned("step");
    PyObject* const window_key = interned("window");
    PyObject* const last_step_key = interned("last_step");
    py::list without_state, not_native, lagging, idle, rewritten;
    const bool lazy = group_rule.lazy != Lazy::kFrozen;
    Update u;
    RuleParams rule = group_rule;
    if (THPVariable_Check(lr.ptr())) u.lr = tensor(lr);
    else rule.lr = lr.cast<double>();
    const Form by_rows_form(rule, false), flat_form(rule, true);
    u.group = group;
    if (history) {
      histories_.insert(history);
      stretches_.push_back(history->stretches());
    }

    const int64_t count =
        positions ? static_cast<int64_t>(positions->size()) : PyList_GET_SIZE(params.ptr());
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = positions ? (*positions)[n] : n;
      // Where a gradient comes from Python, its code may change list and state.
      if (i >= PyList_GET_SIZE(params.ptr())) break;
      const auto held = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params.ptr(), i));
      PyObject* const object = held.ptr();
      u.param = tensor(held);
      if (lazy && rule.adds) {
        // Unless another thread is about to bring rows up to date.
        const std::unique_lock lock(history->rows(), std::try_to_lock);
        if (lock && history->rewritten(i, u.param)) rewritten.append(i);
      }
      if (rule.adds) {
        u.grad = gradient(object, u.param);
        if (!u.grad.defined() && !lazy) continue;
      }
      PyObject* const own = PyDict_GetItemWithError(state.ptr(), object);
      if (!own && PyErr_Occurred()) throw py::error_already_set();
      if (rule.adds) {
        if (!u.grad.defined()) {
          const bool clocked = own && PyDict_Check(own) && PyDict_Contains(own, last_step_key) == 1;
          if (PyErr_Occurred()) throw py::error_already_set();
          if (!clocked || !u.param.requires_grad()) idle.append(i);
          written_.push_back({history, i, u.param});
          continue;
        }
        u.grad = materialized(u.grad);
      }
      if (!rule.adds) {  // only what is in a window takes part
        const int in_window = own && PyDict_Check(own) ? PyDict_Contains(own, window_key) : 0;
        if (in_window < 0) throw py::error_already_set();
        if (!in_window) continue;
      }
      DeviceStep* const device = device_step(u.param.device().type());
      const bool sparse = rule.adds && u.grad.layout() == at::kSparse;
      if (!device || !is_plain(u.param) || u.param.layout() != at::kStrided ||
          !is_storage_type(u.param.scalar_type()) ||
          (rule.adds && (!is_plain(u.grad) || !(sparse || u.grad.layout() == at::kStrided)))) {
        not_native.append(i);
        continue;
      }

      u.position = static_cast<int>(i);
      const Form& form = u.param.dim() < 2 ? flat_form : by_rows_form;
      bool complete = own && PyDict_Check(own);
      for (int k = 0; k < form.states && complete; ++k)
        complete = read(own, form.keys[k], u.states[k]);
      u.row_moment.reset();
      u.scale.reset();
      u.step.reset();
      // Stored as an option wants it that has been changed since.
      for (int k = 0; k < form.states && complete; ++k)
        complete = u.states[k].dim() == u.param.dim();
      if (complete && form.has_momentum)
        complete = (u.states[0].scalar_type() == at::kChar) == rule.quantises;
      if (form.row_key && complete) complete = read(own, form.row_key, u.row_moment);
      if (complete && form.states > 0 && u.states[0].scalar_type() == at::kChar)
        complete = read(own, scale_key, u.scale);
      if ((form.counts_steps || rule.counts_roundings() || u.scale.defined()) && complete)
        complete = read(own, step_key, u.step);
      if (rule.window && complete) complete = read(own, window_key, u.window);
      if (lazy && complete)
        complete = read(own, last_step_key, u.last_step) && history->has(u.param.device());
      if (PyErr_Occurred()) throw py::error_already_set();
      if (!rule.adds && !complete) continue;
      // Without a gradient, `window` says what goes by rows.
      const bool by_rows = rule.adds && rule.touched != Touched::kAll && u.param.dim() >= 2;
      if (rule.window && complete && rule.adds)
        complete = sparse ? u.window.dim() == u.grad.sparse_dim()
                   : by_rows || (rule.scale == Scale::kRows && u.param.dim() > 0)
                       ? u.window.dim() == 1
                       : !has_row_scales(u) || u.window.dim() == u.scale.dim();
      if (lazy && complete && rule.adds) {
        const int64_t dims = u.last_step.dim();
        complete = sparse                                     ? dims == u.grad.sparse_dim()
                   : u.window.defined() && u.window.dim() > 0 ? dims == u.window.dim()
                   : by_rows                                  ? dims == 1
                                                              : dims > 0 || u.param.dim() < 2;
      }
      if (complete && (u.row_moment.defined() || u.scale.defined())) {
        const int64_t dims = sparse                                     ? u.grad.sparse_dim()
                             : u.window.defined() && u.window.dim() > 0 ? u.window.dim()
                             : by_rows || (rule.scale == Scale::kRows && u.param.dim() > 0) ? 1
                             : lazy && u.last_step.dim() > 0 ? u.last_step.dim()
                                                             : -1;
        if (u.row_moment.defined()) complete = has_rows(u, u.row_moment, dims);
        if (u.scale.defined() && u.row_moment.defined())
          complete = complete && has_rows(u, u.scale, u.row_moment.dim());
        else if (u.scale.defined())
          complete = complete && (dims < 0 && !has_row_scales(u) ? has_block_order(u)
                                                                 : has_rows(u, u.scale, dims));
      }
      if (!complete) {
        without_state.append(i);
        continue;
      }

      u.rule = form.rule;
      if (lazy) history->use(u.rule, u.param.device());
      if (!by_rows || sparse) u.rule.touched = Touched::kAll;
      if (!rule.moves) u.rule.scale = Scale::kNone;
      else if (rule.scale == Scale::kTensor &&
               (sparse || by_rows || (u.window.defined() && u.window.dim() > 0) ||
                has_row_scales(u)))
        u.rule.scale = Scale::kRows;
      if (sparse) {
        if (u.grad.device() != u.param.device() || u.grad.sizes() != u.param.sizes())
          refuse_shape(u, u.grad);
        const auto* impl = static_cast<const at::SparseTensorImpl*>(u.grad.unsafeGetTensorImpl());
        u.indices = impl->indices();
        u.values = materialized(impl->values());
        u.coalesced = impl->coalesced();
        u.grad.reset();
      } else if (!rows.empty()) {
        PyObject* const r = PyDict_GetItemWithError(rows.ptr(), object);
        if (!r && PyErr_Occurred()) throw py::error_already_set();
        if (r && rule.adds) u.mask = tensor(r);
        else if (r && tensor(r).size(0) > 0 && u.window.dim() > 0) u.indices = tensor(r);
      }
      if (lazy && rule.adds && !sparse && !goes_by_rows(u) && device->lags(u)) lagging.append(i);
      device->add(u);
      if (lazy) written_.push_back({history, i, u.param});
      u.grad.reset();
      u.indices.reset();
      u.values.reset();
      u.mask.reset();
      u.coalesced = false;
    }
    return py::make_tuple(without_state, not_native, lagging, idle, rewritten);
  }

  void prepare() {
    py::gil_scoped_release release;
    for (const auto& [type, step] : devices_) step->prepare();
  }

  // Nothing: only a device knows.
  std::optional<bool> cancelled() const {
    std::optional<bool> known;
    for (const auto& [type, step] : devices_)
      if (const std::optional<bool> found = step->cancelled()) known = found;
    return known;
  }

  // Once: a caller that a signal has interrupted may call again.
  void apply() {
    if (std::exchange(applied_, true)) return;
    const py::gil_scoped_release release;
    std::vector<std::unique_lock<std::mutex>> locks;
    for (const auto& history : histories_) locks.emplace_back(history->rows());
    for (const auto& [type, step] : devices_) step->apply();
    for (const Written& w : written_) w.history->note(w.position, w.param);
  }

  // Steps of groups in a lazy mode: (history, group, lr, weight_decay, first beta, last beta).
  using HistoryUse =
      std::tuple<std::shared_ptr<GroupHistory>, int, py::object, double, double, double>;

  void will_advance(const std::vector<HistoryUse>& groups,
                    const std::vector<at::Tensor>& counters) {
    struct Work {
      std::vector<HistoryStep> steps;
      std::vector<at::Tensor> counters;
    };
    std::map<DeviceStep*, Work> work;
    for (const auto& [history, group, lr, weight_decay, beta1, beta2] : groups) {
      HistoryStep step;
      if (THPVariable_Check(lr.ptr())) step.lr = tensor(lr);
      else step.setting.lr = lr.cast<double>();
      step.setting.weight_decay = weight_decay;
      step.setting.beta1 = beta1;
      step.setting.beta2 = beta2;
      step.place.group = group;
      for (const auto& [device, copy] : history->copies()) {
        step.copy = copy.get();
        work[device_step(device.type())].steps.push_back(step);
      }
    }
    for (const at::Tensor& counter : counters) {
      DeviceStep* const device = device_step(counter.device().type());
      if (!device || counter.scalar_type() != at::kLong || counter.numel() != 1 ||
          counter.layout() != at::kStrided || !is_plain(counter) || !holds_its_elements(counter))
        throw std::runtime_error(c10::str("tiger_ext: a state step is ", counter.scalar_type(), " ",
                                          counter.sizes(), " on ", counter.device(),
                                          ", expected one int64 element beside the parameter"));
      work[device].counters.push_back(counter);
    }
    py::gil_scoped_release release;
    for (const auto& [device, w] : work) device->will_advance(w.steps, w.counters);
  }

  // Once, as `apply`.
  void advance() {
    if (std::exchange(advanced_, true)) return;
    const py::gil_scoped_release release;
    for (const auto& [type, step] : devices_) step->advance();
  }

 private:
  DeviceStep* device_step(c10::DeviceType type) {
    if (auto it = devices_.find(type); it != devices_.end()) return it->second.get();
    const DeviceStepFactory make = device_step_factory(type);
    return make ? (devices_[type] = make(context_)).get() : nullptr;
  }

  static const at::Tensor& tensor(py::handle object) {
    if (!THPVariable_Check(object.ptr()))
      throw py::type_error("expected a tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
    return THPVariable_Unpack(object.ptr());
  }

  static const at::Tensor& element(py::handle object, const char* name) {
    const at::Tensor& t = tensor(object);
    if (t.numel() != 1)
      throw std::runtime_error(
          c10::str("tiger_ext: ", name, " has ", t.numel(), " elements, expected one"));
    return t;
  }

  // As `object.grad` in Python; undefined for None. A class of its own may make a property of it.
  static at::Tensor gradient(PyObject* object, const at::Tensor& param) {
    if (THPVariable_CheckExact(object)) return param.unsafeGetTensorImpl()->grad();
    const auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, interned("grad")));
    if (!grad) throw py::error_already_set();
    return grad.is_none() ? at::Tensor() : tensor(grad);
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

  // The rule of a group's parameters, of those with rows or of flat ones, and what their state has.
  struct Form {
    Form(const RuleParams& group, bool flat) : rule(flat ? without_rows(group) : group) {
      const RuleInfo& info = rule_info(rule.kind);
      states = info.states;
      has_momentum = states > 0 && std::string_view(info.state_names[0]) == "exp_avg";
      counts_steps = info.counts_steps;
      for (int k = 0; k < states; ++k) keys[k] = interned(info.state_names[k]);
      if (info.row_state_name) row_key = interned(info.row_state_name);
    }

    RuleParams rule;
    int states = 0;
    bool has_momentum = false;  // which may be in int8
    bool counts_steps = false;
    PyObject* keys[kMaxStates] = {};
    PyObject* row_key = nullptr;
  };

  struct Written {  // or looked at
    std::shared_ptr<GroupHistory> history;
    int64_t position;
    at::Tensor param;
  };

  StepContext context_;
  std::set<std::shared_ptr<GroupHistory>> histories_;  // in one order for all threads: of addresses
  std::vector<std::shared_ptr<const GroupHistory::Stretches>> stretches_;  // rules point into them
  std::vector<Written> written_;
  bool applied_ = false, advanced_ = false;
  std::map<c10::DeviceType, std::unique_ptr<DeviceStep>> devices_;
};

}  // namespace

void bind_eager(py::module_& m) {
  // Arguments: kind of error, group, position, message. tiger_ext._native.translated adds the name.
  static auto* update_error = new py::object(py::reinterpret_steal<py::object>(
      PyErr_NewException("tiger_ext._C.UpdateError", nullptr, nullptr)));
  m.attr("UpdateError") = *update_error;
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const UpdateError& e) {
      const char* kind = e.kind == UpdateError::Kind::kIndex       ? "index"
                         : e.kind == UpdateError::Kind::kNonfinite ? "nonfinite"
                         : e.kind == UpdateError::Kind::kValue     ? "value"
                                                                   : "runtime";
      PyErr_SetObject(update_error->ptr(),
                      py::make_tuple(kind, e.place.group, e.place.position, e.what()).ptr());
    }
  });

  using Setting = std::tuple<int64_t, double, double, double, double>;
  const auto setting = [](const Setting& s) {
    return HistorySetting{std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s),
                          std::get<4>(s)};
  };
  py::class_<GroupHistory, std::shared_ptr<GroupHistory>>(m, "History")
      .def(py::init<>())
      .def("append", [=](GroupHistory& h, const Setting& s) { h.append(setting(s)); })
      .def("bring_to", &GroupHistory::bring_to)
      .def("has", &GroupHistory::has)
      .def("place",
           [=](GroupHistory& h, c10::Device device, int32_t steps,
               const std::vector<Setting>& settings, bool many) {
             HistoryNumbers numbers;
             numbers.steps = steps;
             for (const Setting& s : settings) numbers.settings.push_back(setting(s));
             return h.place(device, numbers, many);
           })
      .def("reserve", &GroupHistory::reserve)
      .def("has_copies", [](const GroupHistory& h) { return !h.copies().empty(); })
      .def("steps",
           [](const GroupHistory& h, const std::optional<c10::Device>& device) {
             const auto copy = device ? h.copies().find(*device) : h.copies().begin();
             return copy == h.copies().end() ? std::nullopt : std::optional(copy->second->steps());
           })
      .def("forget", &GroupHistory::forget)
      .def("rewritten",
           [](GroupHistory& h, int64_t position, const at::Tensor& param) {
             // Not while another thread is about to bring rows up to date.
             const std::unique_lock lock(h.rows(), std::try_to_lock);
             return lock && h.rewritten(position, param);
           })
      .def("note",
           [](GroupHistory& h, int64_t position, const at::Tensor& param) {
             const std::unique_lock lock(h.rows(), std::try_to_lock);
             if (lock) h.note(position, param);
           })
      .def("read", [](const GroupHistory& h) {
        if (h.copies().empty()) throw std::runtime_error("tiger_ext: the history has no copy");
        const HistoryNumbers numbers = h.copies().begin()->second->read();
        std::vector<Setting> settings;
        for (const HistorySetting& s : numbers.settings)
          settings.emplace_back(s.first, s.lr, s.weight_decay, s.beta1, s.beta2);
        return std::make_pair(numbers.steps, settings);
      });
  py::class_<RuleParams>(m, "Rule").def(py::init(&make_rule));
  m.def("catch_up", &catch_up);

  py::class_<Faults>(m, "Faults").def(py::init<>());
  py::class_<Step>(m, "Step")
      .def(py::init<Faults&, const py::object&, const py::object&>(), py::arg("faults"),
           py::arg("grad_scale"), py::arg("found_inf"), py::keep_alive<1, 2>())
      .def("add_group", &Step::add_group)
      .def("prepare", &Step::prepare)
      .def("cancelled", &Step::cancelled)
      .def("apply", &Step::apply)
      .def("will_advance", &Step::will_advance)
      .def("advance", &Step::advance);
}

}  // namespace tiger_ext
