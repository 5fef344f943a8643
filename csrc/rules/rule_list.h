// SPDX-License-Identifier: Apache-2.0
//
// The list of all update rules. What must know them follows from it: their kinds, the names of
// their state, dispatch on both devices, the ops and their schemas. Host and device, no torch.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "rules/update_rules.h"

namespace tiger_ext {

template <template <typename> class... Rules>
struct RuleList {};

// Of one family, the first that fits a step's parameters is taken.
using AllRules = RuleList<SignMomentum, Momentum, AdamW, AdamWWithoutMoment1, AdamWByRow,
                          AdamWByRowWithoutMoment1, Shrink>;

// A rule's place in the list.
template <typename Rule, template <typename> class... Rules>
constexpr RuleKind kind_in(RuleList<Rules...>) {
  static_assert(
      ((std::is_same_v<Rule, Rules<float>> || std::is_same_v<Rule, Rules<double>>) || ...),
      "the rule is not in the list");
  const bool same[] = {std::is_same_v<Rule, Rules<float>> ||
                       std::is_same_v<Rule, Rules<double>>...};
  int place = 0;
  while (!same[place]) ++place;
  return static_cast<RuleKind>(place);
}
template <typename Rule>
constexpr RuleKind kKindOf = kind_in<Rule>(AllRules());

// Calls f.template operator()<T, Rule>() for the rule of this kind.
template <typename T, typename F, template <typename> class... Rules>
TIGER_EXT_INLINE void with_rule_in(RuleList<Rules...>, RuleKind kind, const F& f) {
  const bool found =
      ((kind == kKindOf<Rules<T>> && (f.template operator()<T, Rules<T>>(), true)) || ...);
  static_cast<void>(found);
}
template <typename T, typename F>
TIGER_EXT_INLINE void with_rule(RuleKind kind, const F& f) {
  with_rule_in<T>(AllRules(), kind, f);
}

// Calls f.template operator()<T, Rule>() for every rule of groups all of whose states have the
// parameter's shape.
template <typename T, typename F, template <typename> class... Rules>
void for_each_elementwise_rule_in(RuleList<Rules...>, const F& f) {
  const auto call = [&]<typename Rule>() {
    if constexpr (kIsOfGroups<Rule> && !kHasRowMoment<Rule>) f.template operator()<T, Rule>();
  };
  (call.template operator()<Rules<T>>(), ...);
}
template <typename T, typename F>
void for_each_elementwise_rule(const F& f) {
  for_each_elementwise_rule_in<T>(AllRules(), f);
}

// Likewise for every rule of groups.
template <typename T, typename F, template <typename> class... Rules>
void for_each_group_rule_in(RuleList<Rules...>, const F& f) {
  const auto call = [&]<typename Rule>() {
    if constexpr (kIsOfGroups<Rule>) f.template operator()<T, Rule>();
  };
  (call.template operator()<Rules<T>>(), ...);
}
template <typename T, typename F>
void for_each_group_rule(const F& f) {
  for_each_group_rule_in<T>(AllRules(), f);
}

// What those know of a rule that have its kind alone.
struct RuleInfo {
  const char* family = nullptr;  // null: it is no rule of a parameter group
  int states = 0;                // of the parameter's shape
  const char* state_names[kMaxStates] = {};
  const char* row_state_name = nullptr;  // null: no state has one number a row
  bool counts_steps = false;
  bool has_eps = false;
  bool directed = false;
  RuleKind general{};
  bool (*fits)(const RuleParams&) = nullptr;
};

template <typename Rule>
constexpr RuleInfo info_of() {
  RuleInfo info;
  info.states = Rule::kStates;
  if constexpr (kIsOfGroups<Rule>) {
    using General = typename Rule::General;
    static_assert(std::is_same_v<General, typename General::General>);
    static_assert(Rule::kStates == General::kStates && Rule::kFamily == General::kFamily &&
                      std::is_base_of_v<General, Rule>,
                  "a rule that derives from another one must say what its General is");
    info.family = Rule::kFamily;
    for (int k = 0; k < Rule::kStates; ++k) info.state_names[k] = Rule::kStateNames[k];
    if constexpr (kHasRowMoment<Rule>) info.row_state_name = Rule::kRowStateName;
    info.counts_steps = Rule::kCountsSteps;
    info.has_eps = Rule::kHasEps;
    info.directed = Rule::kDirected;
    info.general = kKindOf<General>;
    info.fits = &Rule::fits;
  }
  return info;
}

template <typename List>
struct RuleInfos;
template <template <typename> class... Rules>
struct RuleInfos<RuleList<Rules...>> {
  static constexpr int kCount = sizeof...(Rules);
  static constexpr RuleInfo kInfos[] = {info_of<Rules<float>>()...};
};

constexpr int kRuleCount = RuleInfos<AllRules>::kCount;

inline const RuleInfo& rule_info(RuleKind kind) {
  return RuleInfos<AllRules>::kInfos[static_cast<int>(kind)];
}

// The kind of a family's rule for these parameters. Throws std::invalid_argument if there is none.
inline RuleKind kind_for(std::string_view family, const RuleParams& params) {
  for (int kind = 0; kind < kRuleCount; ++kind) {
    const RuleInfo& info = rule_info(static_cast<RuleKind>(kind));
    if (info.family && family == info.family && info.fits(params))
      return static_cast<RuleKind>(kind);
  }
  throw std::invalid_argument("there is no rule '" + std::string(family) + "'");
}

}  // namespace tiger_ext
