// SPDX-License-Identifier: Apache-2.0
//
// The list of rules: kinds, dispatch, and what stands in the table of each.
#include "rules/rule_list.h"

#include <string_view>

#include "../check.h"

using namespace tiger_ext;

namespace {

template <template <typename> class Rule>
void check_kind(int place) {
  CHECK(static_cast<int>(kKindOf<Rule<float>>) == place);
  CHECK(kKindOf<Rule<double>> == kKindOf<Rule<float>>);
  int calls = 0;
  with_rule<double>(static_cast<RuleKind>(place), [&]<typename T, typename Called>() {
    static_assert(std::is_same_v<T, double>);
    ++calls;
    CHECK((std::is_same_v<Called, Rule<double>>));
  });
  CHECK(calls == 1);
}

RuleKind kind(std::string_view family, double beta1, Direction direction, int32_t window) {
  RuleParams r;
  r.beta1 = beta1, r.direction = direction, r.window = window;
  return kind_for(family, r);
}

void check_kind_for() {
  CHECK(kind("sign_momentum", 0.9, Direction::kSign, 0) == kKindOf<SignMomentum<float>>);
  CHECK(kind("sign_momentum", 0.0, Direction::kSign, 0) == kKindOf<SignMomentum<float>>);
  CHECK(kind("sign_momentum", 0.9, Direction::kClip, 0) == kKindOf<Momentum<float>>);
  CHECK(kind("sign_momentum", 0.9, Direction::kSign, 1) == kKindOf<Momentum<float>>);
  CHECK(kind("adamw", 0.9, Direction::kSign, 0) == kKindOf<AdamW<float>>);
  CHECK(kind("adamw", 0.0, Direction::kSign, 0) == kKindOf<AdamWWithoutMoment1<float>>);
  bool refused = false;
  try {
    kind("shrink", 0.9, Direction::kSign, 0);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

void check_infos() {
  const RuleInfo& adamw = rule_info(kKindOf<AdamW<float>>);
  CHECK(adamw.states == 2 && adamw.counts_steps && adamw.has_eps && !adamw.directed);
  CHECK(std::string_view(adamw.state_names[0]) == "exp_avg");
  CHECK(std::string_view(adamw.state_names[1]) == "exp_avg_sq");
  const RuleInfo& rmsprop = rule_info(kKindOf<AdamWWithoutMoment1<float>>);
  CHECK(rmsprop.states == 1 && std::string_view(rmsprop.state_names[0]) == "exp_avg_sq");
  CHECK(rmsprop.general == kKindOf<AdamWWithoutMoment1<float>>);
  const RuleInfo& by_row = rule_info(kKindOf<AdamWByRow<float>>);
  CHECK(by_row.states == 1 && std::string_view(by_row.state_names[0]) == "exp_avg");
  CHECK(std::string_view(by_row.row_state_name) == "exp_avg_sq" && by_row.counts_steps);
  CHECK(adamw.row_state_name == nullptr && rmsprop.row_state_name == nullptr);
  const RuleInfo& row_only = rule_info(kKindOf<AdamWByRowWithoutMoment1<float>>);
  CHECK(row_only.states == 0 && std::string_view(row_only.row_state_name) == "exp_avg_sq");
  const RuleInfo& sign = rule_info(kKindOf<SignMomentum<float>>);
  CHECK(sign.states == 1 && !sign.counts_steps && !sign.directed);
  CHECK(sign.general == kKindOf<Momentum<float>>);
  CHECK(rule_info(sign.general).directed);
  CHECK(rule_info(kKindOf<Shrink<float>>).family == nullptr);
}

void check_for_each() {
  int kinds = 0;
  for_each_elementwise_rule<float>(
      [&]<typename T, typename Rule>() { kinds |= 1 << int(kKindOf<Rule>); });
  const int others = 1 << int(kKindOf<Shrink<float>>) | 1 << int(kKindOf<AdamWByRow<float>>) |
                     1 << int(kKindOf<AdamWByRowWithoutMoment1<float>>);
  CHECK(kinds == ((1 << kRuleCount) - 1 - others));
}

}  // namespace

int main() {
  check_kind<SignMomentum>(0);
  check_kind<Momentum>(1);
  check_kind<AdamW>(2);
  check_kind<AdamWWithoutMoment1>(3);
  check_kind<AdamWByRow>(4);
  check_kind<AdamWByRowWithoutMoment1>(5);
  check_kind<Shrink>(6);
  check_kind_for();
  check_infos();
  check_for_each();
  return failures != 0;
}
