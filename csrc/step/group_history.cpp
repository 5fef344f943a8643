// SPDX-License-Identifier: Apache-2.0
#include "step/group_history.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

namespace tiger_ext {
namespace {

std::array<HistoryCopyFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& factories() {
  static std::array<HistoryCopyFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES> table{};
  return table;
}

// A number for each state of each history.
uint32_t next_number() {
  static std::atomic<uint32_t> states{0};
  return ++states;
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
  const size_t count = stretches_->size();
  if (count == stretches_->capacity()) {  // never in place: somebody may be reading
    auto larger = std::make_shared<Stretches>();
    larger->reserve(std::max<size_t>(2 * count, 16));
    *larger = *stretches_;
    stretches_ = std::move(larger);
  }
  stretches_->emplace_back();
  stretches_->resize(append_step(stretches_->data(), static_cast<int64_t>(count), s.first, s.lr,
                                 s.weight_decay, s.beta1, s.beta2));
}

void GroupHistory::bring_to(int32_t steps) {
  if (steps == current_ && stretches_->size() == known_) return;
  number_ = next_number();
  current_ = steps;
  known_ = stretches_->size();
}

void GroupHistory::forget() {
  stretches_ = std::make_shared<Stretches>();
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
  rule.stretches = stretches_->data();
  rule.stretch_count = static_cast<int64_t>(known_);
}

void GroupHistory::use_until(RuleParams& rule, int32_t step) {
  rule.current = step;
  rule.history = next_number();
}

bool GroupHistory::place(c10::Device device, const HistoryNumbers& numbers, bool many) {
  const HistoryCopyFactory make = history_copy_factory(device.type());
  if (!make) return false;
  if (!copies_.count(device)) copies_.emplace(device, make(device, numbers, many));
  return true;
}

bool GroupHistory::rewritten(int64_t position, const at::Tensor& param) const {
  if (position >= static_cast<int64_t>(seen_.size()) || param.is_inference()) return false;
  const Seen& seen = seen_[position];
  return seen.param == param.unsafeGetTensorImpl() && seen.version != param._version();
}

void GroupHistory::note(int64_t position, const at::Tensor& param) {
  if (param.is_inference()) return;
  if (position >= static_cast<int64_t>(seen_.size())) seen_.resize(position + 1);
  seen_[position] = {param.unsafeGetTensorImpl(), param._version()};
}

}  // namespace tiger_ext
