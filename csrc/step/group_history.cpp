// SPDX-License-Identifier: Apache-2.0
#include "step/group_history.h"

#include <array>
#include <atomic>

namespace tiger_ext {
namespace {

std::array<HistoryCopyFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& factories() {
  static std::array<HistoryCopyFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES> table{};
  return table;
}

}  // namespace

HistoryCopyRegistration::HistoryCopyRegistration(c10::DeviceType device,
                                                 HistoryCopyFactory factory) {
  factories()[static_cast<size_t>(device)] = factory;
}

HistoryCopyFactory history_copy_factory(c10::DeviceType device) {
  return factories()[static_cast<size_t>(device)];
}

void GroupHistory::append(const HistorySetting& s) {
  const int64_t count = static_cast<int64_t>(stretches_.size());
  stretches_.emplace_back();
  stretches_.resize(
      append_step(stretches_.data(), count, s.first, s.lr, s.weight_decay, s.beta1, s.beta2));
}

void GroupHistory::bring_to(int32_t steps) {
  if (steps == current_ && stretches_.size() == known_) return;
  static std::atomic<uint32_t> states{0};
  number_ = ++states;
  current_ = steps;
  known_ = stretches_.size();
}

void GroupHistory::forget() {
  stretches_.clear();
  known_ = ~size_t{0};
  for (const auto& [device, copy] : copies_) copy->forget();
}

void GroupHistory::reserve(bool many) {
  for (const auto& [device, copy] : copies_) copy->reserve(many);
}

bool GroupHistory::has(c10::Device device) const {
  if (history_copy_factory(device.type())) return copies_.count(device) > 0;
  return current_ >= 0;
}

void GroupHistory::use(RuleParams& rule, c10::Device device) const {
  if (history_copy_factory(device.type())) return copies_.at(device)->use(rule);
  rule.current = current_;
  rule.history = number_;
  rule.stretches = stretches_.data();
  rule.stretch_count = static_cast<int64_t>(known_);
}

bool GroupHistory::place(c10::Device device, const HistoryNumbers& numbers, bool many) {
  const HistoryCopyFactory make = history_copy_factory(device.type());
  if (!make) return false;
  if (!copies_.count(device)) copies_.emplace(device, make(device, numbers, many));
  return true;
}

}  // namespace tiger_ext
