// SPDX-License-Identifier: Apache-2.0
#include "rules_cuda.cuh"

#include "multi_tensor.cuh"

namespace tiger_ext {
namespace {

constexpr int64_t kSlotBytes = 128;
static_assert(sizeof(SignMomentum<double>) <= kSlotBytes && sizeof(AdamW<double>) <= kSlotBytes);

struct ResolveRule {
  struct Item {
    RuleParams params;
    const double* lr;
    int64_t* step;
    void* slot;
    bool is_double;
  };
  static constexpr int kSharedBytes = 0, kMinBlocks = 1;

  const float* grad_scale;
  const float* found_inf;

  int64_t blocks(const Item&) const { return 1; }

  __device__ void operator()(const Item& item, uint32_t) const {
    if (threadIdx.x != 0 || step_cancelled(found_inf)) return;
    RuleParams params = item.params;
    if (item.lr) params.lr = *item.lr;
    if (grad_scale) params.grad_factor /= static_cast<double>(*grad_scale);
    if (item.step) set_bias_corrections(params, ++*item.step);
    if (item.is_double) write<double>(params, item.slot);
    else write<float>(params, item.slot);
  }

  template <typename T>
  __device__ static void write(const RuleParams& params, void* slot) {
    switch (params.kind) {
      case RuleKind::kSignMomentum:
        *static_cast<SignMomentum<T>*>(slot) = SignMomentum<T>(params);
        return;
      case RuleKind::kAdamW:
        *static_cast<AdamW<T>*>(slot) = AdamW<T>(params);
        return;
      case RuleKind::kAdamWWithoutMoment1:
        *static_cast<AdamWWithoutMoment1<T>*>(slot) = AdamWWithoutMoment1<T>(params);
        return;
    }
  }
};

}  // namespace

// Neighbouring items mostly share a rule, and then the result; a counter belongs to one item.
int RulesOnDevice::add(const RuleUse& use, bool is_double) {
  if (!use.lr && !use.step && !context_->grad_scale) return -1;
  if (!jobs_.empty() && !use.step) {
    const Job& last = jobs_.back();
    if (last.use.params == use.params && last.use.lr == use.lr && !last.use.step &&
        last.is_double == is_double)
      return static_cast<int>(jobs_.size()) - 1;
  }
  jobs_.push_back({use, is_double});
  return static_cast<int>(jobs_.size()) - 1;
}

void RulesOnDevice::prepare(const std::vector<DenseItem>& dense, const std::vector<RowsItem>& rows,
                            const std::vector<RuleUse>& idle, const DeviceContext& context) {
  context_ = &context;
  for (const DenseItem& item : dense)
    dense_.push_back(add(item.rule, item.param.storage == Storage::kFloat64));
  for (const RowsItem& item : rows)
    rows_.push_back(add(item.rule, item.param.storage == Storage::kFloat64));
  for (const RuleUse& use : idle)
    if (use.step) add(use, false);
  if (!jobs_.empty())
    memory_ = static_cast<char*>(context.allocate(kSlotBytes * static_cast<int64_t>(jobs_.size())));
}

void RulesOnDevice::run() const {
  std::vector<ResolveRule::Item> items;
  items.reserve(jobs_.size());
  for (const Job& job : jobs_)
    items.push_back({*job.use.params, job.use.lr, job.use.step,
                     memory_ + kSlotBytes * static_cast<int64_t>(items.size()), job.is_double});
  multi_tensor_apply(items, ResolveRule{context_->grad_scale, context_->found_inf},
                     context_->stream);
}

const void* RulesOnDevice::slot(int job) const {
  return job < 0 ? nullptr : memory_ + kSlotBytes * static_cast<int64_t>(job);
}

}  // namespace tiger_ext
