// SPDX-License-Identifier: Apache-2.0
//
// The dense road on CUDA: each tensor is cut into chunks, one block each; a thread takes vectors of
// 16 bytes, several at once, so that enough loads are in flight to saturate the memory.
#include "cuda/multi_tensor.cuh"
#include "cuda/roads.h"
#include "cuda/rules.cuh"
#include "cuda/vectors.cuh"

#include <type_traits>

namespace tiger_ext {
namespace {

constexpr int kChunk = 8192;  // elements
constexpr int kVectorBytes = 16;

template <typename Rule>
constexpr int kStreams = 2 + Rule::kStates;

// One tensor. Its streams: parameter, gradient, states.
template <typename T, typename Rule>
struct DenseWork {
  RuleSlot<Rule> rule;
  Shrink<T> shrink;  // if that is the verdict
  void* data[kStreams<Rule>];
  int64_t numel;
  Storage storage[kStreams<Rule>];
  bool aligned[kStreams<Rule>];  // from `head` on
  int8_t head;                   // elements before the first vector

  __device__ Stream stream(int k) const { return {data[k], storage[k]}; }
};

// Vectors of kWidth elements. With a fixed Access all streams are aligned.
template <typename T, typename Rule, typename Access, int kWidth>
struct DenseUpdate {
  using Item = DenseWork<T, Rule>;
  static constexpr bool kAligned = !std::is_same_v<Access, Any>;
  static constexpr int kSharedBytes = 0, kMinBlocks = kAligned && kWidth == 4 ? 4 : 2;
  // Vectors of each stream that a thread loads before it computes.
  static constexpr int kUnroll = kAligned ? 2 : 1;

  const float* found_inf;

  // The first chunk includes the head.
  int64_t blocks(const Item& item) const {
    const int64_t body = item.numel - item.head;
    return body > kChunk ? (body + kChunk - 1) / kChunk : 1;
  }

  __device__ void operator()(const Item& item, uint32_t chunk) const {
    if (step_cancelled(found_inf)) return;
    const Verdict verdict = item.rule.verdict();
    if (verdict == Verdict::kSkip) return;
    if (verdict == Verdict::kShrink) return shrink(item, chunk);
    const Rule rule = item.rule.get();
    const int64_t begin = item.head + static_cast<int64_t>(chunk) * kChunk;
    const int count = static_cast<int>(item.numel - begin < kChunk ? item.numel - begin : kChunk);
    const int vectors = count / kWidth;
    const int thread = static_cast<int>(threadIdx.x);

    for (int first = thread; first < vectors; first += kUnroll * kThreads) {
      T grad[kUnroll][kWidth], param[kUnroll][kWidth], states[kUnroll][Rule::kStates][kWidth];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int v = first + u * kThreads;
        if (v >= vectors) break;
        const int64_t i = begin + v * kWidth;
        load_grad(item, i, kAligned || item.aligned[1], grad[u]);
        load(item, 0, i, param[u]);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) load(item, 2 + k, i, states[u][k]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int v = first + u * kThreads;
        if (v >= vectors) break;
        const int64_t i = begin + v * kWidth;
        apply_rule(rule, grad[u], param[u], states[u]);
        if (moves_param(rule)) store(item, 0, i, param[u]);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) store(item, 2 + k, i, states[u][k]);
      }
    }
    if (chunk == 0 && thread < item.head) one(rule, item, thread);
    const int tail = vectors * kWidth + thread;
    if (tail < count) one(rule, item, begin + tail);
  }

 private:
  __device__ static void load(const Item& item, int k, int64_t i, T (&out)[kWidth]) {
    load_vector<Access>(item.stream(k), i, kAligned || item.aligned[k], out);
  }
  __device__ static void store(const Item& item, int k, int64_t i, const T (&in)[kWidth]) {
    store_vector<Access>(item.stream(k), i, kAligned || item.aligned[k], in);
  }

  __device__ static void one(const Rule& rule, const Item& item, int64_t i) {
    T grad[1], param[1], states[Rule::kStates][1];
    load_grad(item, i, true, grad);
    load_vector<Access>(item.stream(0), i, true, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k)
      load_vector<Access>(item.stream(2 + k), i, true, states[k]);
    apply_rule(rule, grad, param, states);
    if (moves_param(rule)) store_vector<Access>(item.stream(0), i, true, param);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k)
      store_vector<Access>(item.stream(2 + k), i, true, states[k]);
  }

  // Without a gradient, which only a window's closing step has, it is zero.
  template <int kCount>
  __device__ static void load_grad(const Item& item, int64_t i, bool aligned, T (&out)[kCount]) {
    if constexpr (Rule::kDirected) {
      if (!item.data[1]) {
#pragma unroll
        for (int w = 0; w < kCount; ++w) out[w] = T(0);
        return;
      }
    }
    load_vector<Access>(item.stream(1), i, aligned, out);
  }

  // Rare: no need to be fast.
  __device__ static void shrink(const Item& item, uint32_t chunk) {
    const int64_t begin = chunk == 0 ? 0 : item.head + static_cast<int64_t>(chunk) * kChunk;
    const int64_t last = item.head + static_cast<int64_t>(chunk + 1) * kChunk;
    const int64_t end = last < item.numel ? last : item.numel;
    for (int64_t i = begin + static_cast<int64_t>(threadIdx.x); i < end; i += kThreads) {
      T param[1];
      load_vector<Access>(item.stream(0), i, true, param);
      item.shrink(T(0), param[0]);
      store_vector<Access>(item.stream(0), i, true, param);
    }
  }
};

// Chooses the head so that as many streams as possible are aligned after it; returns how many.
template <typename T, typename Rule>
int align(DenseWork<T, Rule>& work, int width) {
  int best = -1;
  for (int head = 0; head < width && best < kStreams<Rule>; ++head) {
    bool aligned[kStreams<Rule>];
    int count = 0;
    for (int k = 0; k < kStreams<Rule>; ++k) {
      const int64_t size = storage_size(work.storage[k]);
      aligned[k] =
          (reinterpret_cast<uintptr_t>(work.data[k]) + static_cast<uintptr_t>(head * size)) %
              (size * width) ==
          0;
      count += aligned[k];
    }
    if (count <= best) continue;
    best = count;
    work.head = static_cast<int8_t>(head < work.numel ? head : work.numel);
    std::copy(aligned, aligned + kStreams<Rule>, work.aligned);
  }
  return best;
}

// The works of one rule and arithmetic type, by the kernel that fits.
template <typename T, typename Rule>
class Works {
 public:
  void add(const DenseItem& item, const void* resolved) {
    DenseWork<T, Rule> work{};
    work.rule = {*item.rule.params, resolved};
    work.shrink = Shrink<T>(*item.rule.params);
    const Stream* streams[] = {&item.param, &item.grad, &item.states[0], &item.states[1]};
    bool uniform = true;
    for (int k = 0; k < kStreams<Rule>; ++k) {
      work.data[k] = streams[k]->data;
      work.storage[k] = streams[k]->storage;
      uniform = uniform && streams[k]->storage == item.param.storage;
    }
    work.numel = item.numel;
    const int uniform_width = kVectorBytes / static_cast<int>(storage_size(item.param.storage));
    if (kSpecialised && uniform && align(work, uniform_width) == kStreams<Rule>) {
      uniform_[static_cast<int>(item.param.storage)].push_back(work);
    } else {
      align(work, kAnyWidth);
      any_.push_back(work);
    }
  }

  void launch(const DeviceContext& context) const {
    if constexpr (!kSpecialised) {
    } else if constexpr (sizeof(T) == 8) {
      launch_uniform<Storage::kFloat64>(context);
    } else {
      launch_uniform<Storage::kFloat32>(context);
      launch_uniform<Storage::kBFloat16>(context);
      launch_uniform<Storage::kFloat16>(context);
    }
    multi_tensor_apply(any_, DenseUpdate<T, Rule, Any, kAnyWidth>{context.found_inf},
                       context.stream);
  }

 private:
  static constexpr int kAnyWidth = kVectorBytes / sizeof(T);
  // One kernel for all storage types is enough for the rarer rule.
  static constexpr bool kSpecialised = !Rule::kDirected;

  template <Storage kStorage>
  void launch_uniform(const DeviceContext& context) const {
    constexpr int kWidth = kVectorBytes / static_cast<int>(storage_size(kStorage));
    multi_tensor_apply(uniform_[static_cast<int>(kStorage)],
                       DenseUpdate<T, Rule, Fixed<kStorage>, kWidth>{context.found_inf},
                       context.stream);
  }

  std::vector<DenseWork<T, Rule>> uniform_[4];  // by storage
  std::vector<DenseWork<T, Rule>> any_;
};

}  // namespace

void DenseRoadCuda::prepare(const std::vector<DenseItem>& items, const DeviceContext& context) {
  items_ = &items;
  context_ = &context;
}

void DenseRoadCuda::run(const RulesOnDevice& rules) const {
  for_each_type_and_rule([&]<typename T, typename Rule>() {
    Works<T, Rule> works;
    for (size_t i = 0; i < items_->size(); ++i) {
      const DenseItem& item = (*items_)[i];
      if (!item.has_blocks() && is_updated_by<T, Rule>(item.rule, item.param))
        works.add(item, rules.dense(i));
    }
    works.launch(*context_);
  });
  update_compact_blocks(*items_, rules, *context_);
}

}  // namespace tiger_ext
