// SPDX-License-Identifier: Apache-2.0
#include "cuda/rules.cuh"

#include "cuda/compact.cuh"
#include "cuda/multi_tensor.cuh"
#include "cuda/vectors.cuh"

namespace tiger_ext {
namespace {

constexpr int64_t kSlotBytes = 128;
static_assert(sizeof(ResolvedRule<Momentum<double>>) <= kSlotBytes &&
              sizeof(ResolvedRule<AdamW<double>>) <= kSlotBytes &&
              sizeof(ResolvedRule<AdamWByRow<double>>) <= kSlotBytes);

// The sum of every thread's facts, in a fixed order, for thread 0.
__device__ Facts sum_over_block(const Facts& own) {
  Facts* const all = &shared_memory<Facts>();
  const int thread = static_cast<int>(threadIdx.x);
  all[thread] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) all[thread].add(all[thread + half]);
  }
  return all[0];
}
constexpr int kFactsBytes = kThreads * sizeof(Facts);

// What of a rule's constants the device knows.
__device__ void complete(RuleParams& params, const double* lr, const float* grad_scale,
                         const int32_t* window) {
  if (lr) params.lr = *lr;
  if (grad_scale) params.grad_factor /= static_cast<double>(*grad_scale);
  if (window) params.decays = params.adds && *window != params.window;
}

// What the chunks of a dense item are like, as far as its rule asks.
template <typename T>
struct LookDense {
  struct Item {
    RuleParams params;
    Stream param, grad, exp_avg;
    const float* scales;  // of exp_avg in int8, or null
    const int32_t* window;
    int64_t numel;
    Facts* facts;   // one a chunk, or null
    int32_t place;  // for `bad`
  };
  static constexpr int kSharedBytes = kFactsBytes, kMinBlocks = 2;
  static constexpr int64_t kChunk = 8192;

  const float* grad_scale;
  const float* found_inf;
  int32_t* bad;  // if set: the first item that is not finite

  static int64_t chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }
  int64_t blocks(const Item& item) const { return chunks(item.numel); }

  __device__ void operator()(const Item& item, uint32_t chunk) const {
    if (step_cancelled(found_inf)) return;
    RuleParams params = item.params;
    complete(params, nullptr, grad_scale, item.window);
    const Momentum<T> rule(params);
    const bool scaled = params.scale != Scale::kNone;
    const bool directed = scaled && params.direction != Direction::kSign;
    const bool finite = params.adds && params.nonfinite != Nonfinite::kPropagate;
    const int64_t begin = chunk * kChunk;
    const int64_t end = item.numel - begin < kChunk ? item.numel : begin + kChunk;
    Facts facts;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      T x[1], g[1] = {T(0)};
      if ((finite || directed) && item.grad.data) load_vector<Any>(item.grad, i, true, g);
      if (finite) facts.finite = facts.finite && g[0] - g[0] == T(0);
      if (scaled) {
        load_vector<Any>(item.param, i, true, x);
        facts.params += static_cast<double>(x[0]) * static_cast<double>(x[0]);
      }
      if (directed) {
        if (item.scales) load_scaled(item.exp_avg, i, item.scales[i / kRoundingBlock], x);
        else load_vector<Any>(item.exp_avg, i, true, x);
        rule.with_direction([&]<Direction kDirection>() {
          const double d = static_cast<double>(rule.template direction_at<kDirection>(g[0], x[0]));
          facts.directions += d * d;
        });
      }
    }
    const Facts sum = sum_over_block(facts);
    if (threadIdx.x != 0) return;
    if (item.facts) item.facts[chunk] = sum;
    if (bad && !sum.finite) atomicMin(bad, item.place);
  }
};

struct ResolveRule {
  struct Item {
    RuleParams params;
    const double* lr;
    int64_t* step;
    int32_t* window;     // of a dense item
    const Facts* facts;  // of its chunks
    int64_t chunks;
    int64_t numel;
    void* slot;
    bool is_double;
  };
  static constexpr int kSharedBytes = kFactsBytes, kMinBlocks = 1;

  const float* grad_scale;
  const float* found_inf;

  int64_t blocks(const Item&) const { return 1; }

  __device__ void operator()(const Item& item, uint32_t) const {
    if (step_cancelled(found_inf)) return;
    Facts facts;
    if (item.facts) {
      for (int64_t i = threadIdx.x; i < item.chunks; i += kThreads) facts.add(item.facts[i]);
      facts = sum_over_block(facts);
    }
    if (threadIdx.x != 0) return;
    RuleParams params = item.params;
    complete(params, item.lr, grad_scale, item.window);
    Verdict verdict = item.facts ? judge(params, facts) : Verdict::kUpdate;
    // A parameter that no gradient of the window reached does not move.
    if (item.window && !params.adds && *item.window != params.window) verdict = Verdict::kSkip;
    if (item.facts && params.scale != Scale::kNone) params.rate = facts.rate(params, item.numel);
    if (verdict == Verdict::kUpdate) {
      if (item.window) *item.window = params.window;
      if (item.step) set_bias_corrections(params, ++*item.step);
    }
    if (item.is_double) write<double>(params, verdict, item.slot);
    else write<float>(params, verdict, item.slot);
  }

  template <typename T>
  __device__ static void write(const RuleParams& params, Verdict verdict, void* slot) {
    with_rule<T>(params.kind, [&]<typename, typename Rule>() {
      // The others are a verdict here, never an item's rule.
      if constexpr (kIsOfGroups<Rule>)
        *static_cast<ResolvedRule<Rule>*>(slot) = {verdict, Rule(params)};
    });
  }
};

template <typename T>
typename LookDense<T>::Item look_at(const DenseItem& item, Facts* facts, int32_t place) {
  return {*item.rule.params, item.param, item.grad, item.states[0], item.scales,
          item.rule.window,  item.numel, facts,     place};
}

bool is_double(const DenseItem& item) { return item.param.storage == Storage::kFloat64; }

}  // namespace

// Neighbouring items mostly share a rule, and then the result; a counter, a window and facts belong
// to one item.
int RulesOnDevice::add(const RuleUse& use, bool is_double, const DenseItem* dense) {
  const bool alone = use.step || (dense && (use.window || use.params->looks()));
  if (!use.lr && !context_->grad_scale && !alone) return -1;
  if (!jobs_.empty() && !alone) {
    const Job& last = jobs_.back();
    if (last.use.params == use.params && last.use.lr == use.lr && !last.alone &&
        last.is_double == is_double)
      return static_cast<int>(jobs_.size()) - 1;
  }
  jobs_.push_back({use, is_double, alone, dense, nullptr});
  return static_cast<int>(jobs_.size()) - 1;
}

void RulesOnDevice::prepare(const std::vector<DenseItem>& dense, const std::vector<RowsItem>& rows,
                            const std::vector<RowsItem>& direct, const std::vector<RuleUse>& idle,
                            const DeviceContext& context) {
  context_ = &context;
  for (const DenseItem& item : dense) dense_.push_back(add(item.rule, is_double(item), &item));
  const auto row_job = [&](const RowsItem& item) {
    return add(item.rule, item.param.storage == Storage::kFloat64, nullptr);
  };
  for (const RowsItem& item : rows) rows_.push_back(row_job(item));
  for (const RowsItem& item : direct) direct_.push_back(row_job(item));
  for (const RuleUse& use : idle)
    if (use.step) add(use, false, nullptr);
  if (jobs_.empty()) return;
  memory_ = static_cast<char*>(context.allocate(kSlotBytes * static_cast<int64_t>(jobs_.size())));
  for (Job& job : jobs_)
    if (job.dense && job.use.params->looks())
      job.facts = static_cast<Facts*>(context.allocate(LookDense<float>::chunks(job.dense->numel) *
                                                       static_cast<int64_t>(sizeof(Facts))));
}

void RulesOnDevice::run() const {
  std::vector<LookDense<float>::Item> floats;
  std::vector<LookDense<double>::Item> doubles;
  for (const Job& job : jobs_) {
    if (!job.facts) continue;
    if (job.is_double) doubles.push_back(look_at<double>(*job.dense, job.facts, 0));
    else floats.push_back(look_at<float>(*job.dense, job.facts, 0));
  }
  const DeviceContext& c = *context_;
  multi_tensor_apply(floats, LookDense<float>{c.grad_scale, c.found_inf, nullptr}, c.stream);
  multi_tensor_apply(doubles, LookDense<double>{c.grad_scale, c.found_inf, nullptr}, c.stream);

  std::vector<ResolveRule::Item> items;
  items.reserve(jobs_.size());
  for (const Job& job : jobs_)
    items.push_back({*job.use.params, job.use.lr, job.use.step,
                     job.dense ? job.use.window : nullptr, job.facts,
                     job.facts ? LookDense<float>::chunks(job.dense->numel) : 0,
                     job.dense ? job.dense->numel : 0,
                     memory_ + kSlotBytes * static_cast<int64_t>(items.size()), job.is_double});
  multi_tensor_apply(items, ResolveRule{c.grad_scale, c.found_inf}, c.stream);
}

void find_nonfinite(const std::vector<DenseItem>& items, int32_t* bad,
                    const DeviceContext& context) {
  std::vector<LookDense<float>::Item> floats;
  std::vector<LookDense<double>::Item> doubles;
  for (size_t i = 0; i < items.size(); ++i) {
    const RuleParams& rule = *items[i].rule.params;
    if (rule.nonfinite != Nonfinite::kRaise || !rule.adds) continue;
    const int32_t place = static_cast<int32_t>(i);
    if (is_double(items[i])) doubles.push_back(look_at<double>(items[i], nullptr, place));
    else floats.push_back(look_at<float>(items[i], nullptr, place));
  }
  multi_tensor_apply(floats, LookDense<float>{context.grad_scale, context.found_inf, bad},
                     context.stream);
  multi_tensor_apply(doubles, LookDense<double>{context.grad_scale, context.found_inf, bad},
                     context.stream);
}

const void* RulesOnDevice::slot(int job) const {
  return job < 0 ? nullptr : memory_ + kSlotBytes * static_cast<int64_t>(job);
}

}  // namespace tiger_ext
