// SPDX-License-Identifier: Apache-2.0
#include "step.h"

#include <array>
#include <cmath>

namespace tiger_ext {
namespace {

std::array<DeviceStepFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES>& factories() {
  static std::array<DeviceStepFactory, c10::COMPILE_TIME_MAX_DEVICE_TYPES> table{};
  return table;
}

constexpr RuleNames kRules[] = {
    {RuleKind::kSignMomentum, 1, {"exp_avg", nullptr}, false},
    {RuleKind::kAdamW, 2, {"exp_avg", "exp_avg_sq"}, true},
    {RuleKind::kAdamWWithoutMoment1, 1, {"exp_avg_sq", nullptr}, true},
};

}  // namespace

DeviceRegistration::DeviceRegistration(c10::DeviceType device, DeviceStepFactory factory) {
  factories()[static_cast<size_t>(device)] = factory;
}

DeviceStepFactory device_step_factory(c10::DeviceType device) {
  return factories()[static_cast<size_t>(device)];
}

const RuleNames& rule_names(RuleKind kind) { return kRules[static_cast<int>(kind)]; }

void set_bias_corrections(RuleParams& rule, int64_t t) {
  const double steps = static_cast<double>(t);
  rule.bias_correction1 = 1.0 - std::pow(rule.beta1, steps);
  rule.bias_correction2 = 1.0 - std::pow(rule.beta2, steps);
}

}  // namespace tiger_ext
