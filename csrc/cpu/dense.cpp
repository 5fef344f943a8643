// SPDX-License-Identifier: Apache-2.0
//
// The dense road on the CPU: all tensors of a step are one long range of elements, cut evenly, so
// that a thousand small tensors and one large one scale alike.
#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/roads.h"

namespace tiger_ext {
namespace {

constexpr int64_t kElementsPerTask = 32768;
static_assert(kElementsPerTask % kRoundingBlock == 0);

int64_t next_block(int64_t element) {
  return (element + kRoundingBlock - 1) / kRoundingBlock * kRoundingBlock;
}

}  // namespace

int64_t DenseRoad::prepare(std::vector<DenseItem>& items) {
  items_ = &items;
  starts_.reserve(items.size());
  for (DenseItem& item : items) {
    starts_.push_back(elements_);
    elements_ += item.numel;
    const RuleParams& rule = *item.rule.params;
    if (!rule.looks() && rule.nonfinite != Nonfinite::kRaise) continue;
    looks_.push_back({&item, rule, facts_.size()});
    facts_.resize(facts_.size() + (item.numel + kElementsPerTask - 1) / kElementsPerTask);
  }
  // The others look in `run`: what they look at may not be there yet, as the momentum of a window
  // that closes, or of a state that is stored anew.
  for (const Look& l : looks_) {
    if (l.rule.nonfinite != Nonfinite::kRaise || !l.rule.adds) continue;
    look(l);
    for (size_t k = l.first_chunk;
         k < l.first_chunk + (l.item->numel + kElementsPerTask - 1) / kElementsPerTask; ++k)
      if (!facts_[k].finite) return l.item - items.data();
  }
  return -1;
}

void DenseRoad::look(const Look& l) {
  const CpuKernels& kernels = cpu_kernels();
  for_each_task((l.item->numel + kElementsPerTask - 1) / kElementsPerTask, [&](int64_t chunk) {
    const int64_t begin = chunk * kElementsPerTask;
    facts_[l.first_chunk + chunk] =
        kernels.look(*l.item, begin, std::min(begin + kElementsPerTask, l.item->numel));
  });
}

void DenseRoad::decide(Look& l) const {
  Facts facts;
  for (int64_t i = 0; i < l.item->numel; i += kElementsPerTask)
    facts.add(facts_[l.first_chunk + i / kElementsPerTask]);
  const Verdict verdict = judge(l.rule, facts);
  if (verdict != Verdict::kUpdate)
    l.item->rule.step = nullptr, l.item->rule.window = nullptr, l.item->rule.last_step = nullptr;
  if (verdict == Verdict::kSkip) l.item->numel = 0;
  if (verdict == Verdict::kShrink) l.rule.kind = kKindOf<Shrink<float>>;
  if (l.rule.scale != Scale::kNone) l.rule.rate = facts.rate(l.rule, l.item->numel);
  l.item->rule.params = &l.rule;
}

void DenseRoad::run() {
  const CpuKernels& kernels = cpu_kernels();
  for (Look& l : looks_)
    if (l.rule.looks() && l.item->numel > 0) {
      look(l);
      decide(l);
    }
  for_each_task((elements_ + kElementsPerTask - 1) / kElementsPerTask, [&](int64_t task) {
    const int64_t begin = task * kElementsPerTask;
    const int64_t end = std::min(begin + kElementsPerTask, elements_);
    size_t k = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
    for (; k < starts_.size() && starts_[k] < end; ++k) {
      const DenseItem& item = (*items_)[k];
      int64_t first = std::max(begin - starts_[k], int64_t{0});
      int64_t last = std::min(end - starts_[k], item.numel);
      if (item.has_blocks()) {
        first = next_block(first);
        last = std::min(next_block(last), item.numel);
      }
      if (first < last) kernels.dense(item, first, last);
    }
  });
}

}  // namespace tiger_ext
