// SPDX-License-Identifier: Apache-2.0
//
// One optimizer step over many parameters of one device, in two phases:
//
//     add (every parameter) -> prepare -> apply
//
// `add` and `prepare` check and allocate everything and write to no tensor; `apply` cannot fail. So
// a step happens wholly or not at all. A device implements DeviceStep in files of its own and
// registers a factory; the dispatcher's ops and the eager Python entry (eager.cpp) both go through
// it.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "rules/rule_list.h"
#include "step/faults.h"
#include "step/group_history.h"

namespace tiger_ext {

// One parameter's share of a step. Row-sparse gradients come as `indices` [sparse_dim, nnz] (int64
// or int32) and `values` [nnz, ...]; strided ones as `grad`. With rule.adds == false there is no
// gradient: the rows are those of `indices`, or all that are in the window.
struct Update {
  at::Tensor param;
  at::Tensor grad;
  at::Tensor indices;
  at::Tensor values;
  at::Tensor states[kMaxStates];  // in the order of the rule's kStateNames
  at::Tensor scale;               // of states[0] in int8: float32, one a row or block, contiguous
  at::Tensor row_moment;          // of a rule that has one: one number a row, contiguous
  // The counter of AdamW, and of what is rounded stochastically: one int64 element, one more after
  // `apply`.
  at::Tensor step;
  // In an accumulation window: which window each row (shape: the parameter's first dimensions) or
  // the whole parameter (0-dim) was last part of; int32, contiguous.
  at::Tensor window;
  // In a lazy mode: the step up to which each row (shape: the parameter's first dimensions) or the
  // whole parameter (0-dim) is current; int32, contiguous.
  at::Tensor last_step;
  // For Touched::kMasked: uint8, one element for each index of the first dimension.
  at::Tensor mask;
  at::Tensor lr;  // if defined: one element that takes the place of rule.lr
  RuleParams rule;
  bool coalesced = false;  // whether `indices` are said to be sorted and unique
  int group = 0;           // where the parameter stands, for messages
  int position = 0;
};

// A check that failed; the caller knows the parameter's name and completes the sentence.
struct UpdateError : std::runtime_error {
  enum class Kind { kRuntime, kIndex, kNonfinite, kValue };
  UpdateError(Kind kind, UpdatePlace place, const std::string& message)
      : std::runtime_error(message), kind(kind), place(place) {}
  Kind kind;
  UpdatePlace place;
};

// A NaN or Inf in a gradient whose group has nonfinite="raise".
UpdateError nonfinite_gradient(UpdatePlace place);

// A bad row index, found by the host or reported by a device.
UpdateError bad_index(UpdatePlace place, int64_t entry, int64_t index, int64_t dimension,
                      int64_t rows);

// What all parameters of a step share. Undefined tensors stand for "none".
struct StepContext {
  at::Tensor grad_scale;  // one element: gradients are to be divided by it
  at::Tensor found_inf;   // one element: if not 0, the step must not happen
  Faults* faults = nullptr;
};

// One more step of a group in a lazy mode, for a copy of its history.
struct HistoryStep {
  HistoryCopy* copy = nullptr;
  at::Tensor lr;           // if defined: one element that takes the place of setting.lr
  HistorySetting setting;  // but for `first`
  UpdatePlace place;
};

class DeviceStep {
 public:
  virtual ~DeviceStep() = default;
  // May change `update.rule`.
  virtual void add(Update& update) = 0;
  // Whether rows of a strided gradient's parameter are behind, so that the caller must bring them
  // up to date before `apply`. A device that cannot tell does it in `apply`.
  virtual bool lags(const Update& update) const = 0;
  virtual void prepare() = 0;
  // Whether found_inf cancels the step. Then `apply` must not be called. A device that cannot tell
  // without waiting, and says nothing, leaves its tensors alone in `apply`.
  virtual std::optional<bool> cancelled() const = 0;
  virtual void apply() = 0;
  // Before `apply`: the histories that will take the step, and counters of AdamW that belong to
  // parameters without a gradient.
  virtual void will_advance(const std::vector<HistoryStep>& steps,
                            const std::vector<at::Tensor>& counters) = 0;
  // After `apply`: they do, unless found_inf cancels the step.
  virtual void advance() = 0;
};

using DeviceStepFactory = std::unique_ptr<DeviceStep> (*)(const StepContext& context);

// Registers a device at load time; `static DeviceRegistration r(c10::DeviceType::CPU, make);`
struct DeviceRegistration {
  DeviceRegistration(c10::DeviceType device, DeviceStepFactory factory);
};

// Null when this build has no kernels for the device.
DeviceStepFactory device_step_factory(c10::DeviceType device);

// Whether the momentum in int8 has one scale a row, of any first dimensions of the parameter, and
// not one a block.
bool has_row_scales(const Update& u);

// Whether the update goes by rows: found in a strided gradient, in the window, or because a state
// has one number a row.
bool goes_by_rows(const Update& u);

// How many leading dimensions make a row of it, if its gradient is strided.
int64_t row_dims(const Update& u);

// Brings rows of a table up to date with the rule's history: those of `ids` (integers, any number
// of times each, any shape), or if undefined rows [begin, end). Ids that are no row raise
// UpdateError before anything is written; a device that cannot tell without waiting drops them.
using CatchUpFunction = void (*)(Update& u, const at::Tensor& ids, int64_t begin, int64_t end);

struct CatchUpRegistration {
  CatchUpRegistration(c10::DeviceType device, CatchUpFunction function);
};

// Null when this build has no kernels for the device.
CatchUpFunction catch_up_function(c10::DeviceType device);

}  // namespace tiger_ext
