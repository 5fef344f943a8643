// SPDX-License-Identifier: Apache-2.0
#include "step/step.h"

#include <c10/util/StringUtil.h>

#include <array>
#include <optional>

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

bool has_row_scales(const Update& u) {
  const int64_t dims = u.scale.defined() ? u.scale.dim() : 0;
  return dims > 0 && dims <= u.param.dim() && u.scale.sizes() == u.param.sizes().slice(0, dims);
}

bool goes_by_rows(const Update& u) {
  if ((u.window.defined() && u.window.dim() > 0) || u.row_moment.defined() || has_row_scales(u))
    return true;
  return u.param.dim() > 0 &&
         (u.rule.scale == Scale::kRows || (u.rule.touched != Touched::kAll && u.param.dim() >= 2));
}

int64_t row_dims(const Update& u) {
  if (u.window.defined() && u.window.dim() > 0) return u.window.dim();
  if (u.row_moment.defined()) return u.row_moment.dim();
  return has_row_scales(u) ? u.scale.dim() : 1;
}

UpdateError bad_index(UpdatePlace place, int64_t entry, int64_t index, int64_t dimension,
                      int64_t rows) {
  return {UpdateError::Kind::kIndex, place,
          c10::str("the gradient's entry ", entry, " has row index ", index, " in dimension ",
                   dimension, ", out of range for ", rows, " rows")};
}

void Faults::raise() {
  const std::optional<Fault> fault = take();
  if (!fault) return;
  const auto& [place, entry, index, dimension, rows] = fault->details;
  using Kind = UpdateError::Kind;
  switch (fault->kind) {
    case FaultKind::kNotCoalesced:
      throw UpdateError(Kind::kRuntime, place,
                        c10::str("an earlier gradient was marked as coalesced, but its entry ",
                                 entry, " does not come after the one before it"));
    case FaultKind::kHistoryFull:
      throw UpdateError(
          Kind::kRuntime, place,
          c10::str("the lazy mode's history is full: between two calls of flush() a "
                   "captured graph may change its hyperparameters ",
                   rows, " times; later steps counted with the last that were noted"));
    case FaultKind::kRateTooLarge:
      throw UpdateError(Kind::kValue, place,
                        "an earlier step of its group, in a lazy mode, had lr * weight_decay >= 1");
    case FaultKind::kIndexOutOfRange:
      break;
  }
  const UpdateError error = bad_index(place, entry, index, dimension, rows);
  if (fault->entries == 1) throw error;
  throw UpdateError(Kind::kIndex, place,
                    c10::str(error.what(), " (one of ", fault->entries, " faulty entries)"));
}

}  // namespace tiger_ext
