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
#include <stdexcept>
#include <string>

#include "update_rules.h"

namespace tiger_ext {

constexpr int kMaxStateTensors = 2;

// One parameter's share of a step. Row-sparse gradients come as `indices` [sparse_dim, nnz] (int64)
// and `values` [nnz, ...]; strided ones as `grad`.
struct Update {
  at::Tensor param;
  at::Tensor grad;
  at::Tensor indices;
  at::Tensor values;
  at::Tensor states[kMaxStateTensors];
  at::Tensor step;  // AdamW's counter: 0-dim int64, one more after `apply`
  RuleParams rule;
  int group = 0;  // where the parameter stands, for messages
  int position = 0;
};

// A check that failed; the caller knows the parameter's name and completes the sentence.
struct UpdateError : std::runtime_error {
  enum class Kind { kRuntime, kIndex };
  UpdateError(Kind kind, const Update& u, const std::string& message)
      : std::runtime_error(message), kind(kind), group(u.group), position(u.position) {}
  Kind kind;
  int group;
  int position;
};

class DeviceStep {
 public:
  virtual ~DeviceStep() = default;
  virtual void add(const Update& update) = 0;
  virtual void prepare() = 0;
  virtual void apply() = 0;
};

using DeviceStepFactory = std::unique_ptr<DeviceStep> (*)();

// Registers a device at load time; `static DeviceRegistration r(c10::DeviceType::CPU, make);`
struct DeviceRegistration {
  DeviceRegistration(c10::DeviceType device, DeviceStepFactory factory);
};

// Null when this build has no kernels for the device.
DeviceStepFactory device_step_factory(c10::DeviceType device);

// The order of the state tensors in `Update::states` is that of these names.
struct RuleNames {
  RuleKind kind;
  int states;
  const char* state_names[kMaxStateTensors];
  bool counts_steps;
};
const RuleNames& rule_names(RuleKind kind);

// Sets the bias corrections for step number t.
void set_bias_corrections(RuleParams& rule, int64_t t);

}  // namespace tiger_ext
