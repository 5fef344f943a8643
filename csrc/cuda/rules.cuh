// SPDX-License-Identifier: Apache-2.0
//
// A rule's constants on the device. Mostly the host computes them and they travel in the kernel's
// parameters. Where the learning rate, AdamW's counter or AMP's scale lie in device memory, a small
// kernel computes them there before the update (cuda/roads.h, RulesOnDevice), so that the host
// never waits and a captured graph follows the values of each replay.
#pragma once

#include "cuda/roads.h"
#include "rules/rule_list.h"
#include "step/items.h"

namespace tiger_ext {

// What a kernel finds in device memory.
template <typename Rule>
struct ResolvedRule {
  Verdict verdict;  // of a dense item; first, where it is whatever the rule
  Rule rule;
};

template <typename Rule>
struct RuleSlot {
  Rule rule;  // if `resolved` is null
  const ResolvedRule<Rule>* resolved;

  RuleSlot() = default;
  RuleSlot(const RuleParams& params, const void* resolved)
      : rule(params), resolved(static_cast<const ResolvedRule<Rule>*>(resolved)) {}

  __device__ Rule get() const { return resolved ? resolved->rule : rule; }
  __device__ Verdict verdict() const { return resolved ? resolved->verdict : Verdict::kUpdate; }
};

// Whether AMP found an Inf or NaN and the step must not happen.
__device__ __forceinline__ bool step_cancelled(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0.0f;
}

// Every pair of arithmetic type and rule: calls f.template operator()<T, Rule>().
template <typename F>
void for_each_type_and_rule(const F& f) {
  for_each_elementwise_rule<float>(f);
  for_each_elementwise_rule<double>(f);
}

// Whether a parameter is one for this pair.
template <typename T, typename Rule>
bool is_updated_by(const RuleUse& use, const Stream& param) {
  return kKindOf<Rule> == use.params->kind &&
         (param.storage == Storage::kFloat64) == (sizeof(T) == sizeof(double));
}

}  // namespace tiger_ext
