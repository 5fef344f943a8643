// SPDX-License-Identifier: Apache-2.0
#include "step/step.h"

#include <c10/util/StringUtil.h>

#include <array>
#include <atomic>

namespace tiger_ext {
namespace {

std::array<DeviceStepFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& factories() {
  static std::array<DeviceStepFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES> table{};
  return table;
}

std::array<CatchUpFunction, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& catch_up_functions() {
  static std::array<CatchUpFunction, c10::COMPILE_TIME_MAX_DEVICE_TYPES> table{};
  return table;
}

}  // namespace

DeviceRegistration::DeviceRegistration(c10::DeviceType device, DeviceStepFactory factory) {
  factories()[static_cast<size_t>(device)] = factory;
}

DeviceStepFactory device_step_factory(c10::DeviceType device) {
  return factories()[static_cast<size_t>(device)];
}

CatchUpRegistration::CatchUpRegistration(c10::DeviceType device, CatchUpFunction function) {
  catch_up_functions()[static_cast<size_t>(device)] = function;
}

CatchUpFunction catch_up_function(c10::DeviceType device) {
  return catch_up_functions()[static_cast<size_t>(device)];
}

UpdateError nonfinite_gradient(UpdatePlace place) {
  return {UpdateError::Kind::kNonfinite, place, "the gradient has a NaN or Inf"};
}

bool goes_by_rows(const Update& u) {
  if (u.window.defined() && u.window.dim() > 0) return true;
  return u.param.dim() > 0 &&
         (u.rule.scale == Scale::kRows || (u.rule.touched != Touched::kAll && u.param.dim() >= 2));
}

int64_t row_dims(const Update& u) {
  return u.window.defined() && u.window.dim() > 0 ? u.window.dim() : 1;
}

UpdateError bad_index(UpdatePlace place, int64_t entry, int64_t index, int64_t dimension,
                      int64_t rows) {
  return {UpdateError::Kind::kIndex, place,
          c10::str("the gradient's entry ", entry, " has row index ", index, " in dimension ",
                   dimension, ", out of range for ", rows, " rows")};
}

void Faults::raise() {
  if (!memory) return;
  // The device writes `count` last.
  volatile int64_t& count = memory->count;
  if (count == 0) return;
  std::atomic_thread_fence(std::memory_order_acquire);
  const RowFault fault = *memory;
  count = 0;
  const UpdatePlace place{static_cast<int>(fault.group), static_cast<int>(fault.position)};
  if (fault.kind == RowFault::kNotCoalesced)
    throw UpdateError(UpdateError::Kind::kRuntime, place,
                      c10::str("an earlier gradient was marked as coalesced, but its entry ",
                               fault.entry, " does not come after the one before it"));
  if (fault.kind == RowFault::kHistoryFull)
    throw UpdateError(UpdateError::Kind::kRuntime, place,
                      c10::str("the lazy mode's history is full: between two calls of flush() a "
                               "captured graph may change its hyperparameters ",
                               fault.rows,
                               " times; later steps counted with the last that were "
                               "noted"));
  if (fault.kind == RowFault::kRateTooLarge)
    throw UpdateError(UpdateError::Kind::kValue, place,
                      "an earlier step of its group, in a lazy mode, had lr * weight_decay >= 1");
  throw bad_index(place, fault.entry, fault.index, fault.dimension, fault.rows);
}

}  // namespace tiger_ext
