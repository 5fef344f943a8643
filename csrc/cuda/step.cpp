// SPDX-License-Identifier: Apache-2.0
//
// A step on CUDA devices: tensors become items, memory comes from torch's caching allocator, and
// the roads launch on the current stream of each device. The host never waits for a device.
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/fault_memory.h"
#include "cuda/history.h"
#include "cuda/lazy.h"
#include "cuda/roads.h"
#include "step/checks.h"
#include "step/item_builder.h"
#include "step/step.h"

namespace tiger_ext {
namespace {

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("tiger_ext: ") + what + ": " + cudaGetErrorString(status));
}

// What the kernels that go by rows can take.
void check_rows(const Update& u, int64_t row_dims) {
  const int64_t limit = kMaxSeparateDims;
  if (row_dims > limit || (u.param.dim() - row_dims > limit && !u.param.is_contiguous()))
    refuse(u, "the CUDA kernels take up to ", limit, " sparse and, unless the parameter is ",
           "contiguous, ", limit, " dense dimensions, got ", row_dims, " and ",
           u.param.dim() - row_dims);
  for (int k = 0; k < rule_info(u.rule.kind).states; ++k)
    if (u.param.dim() - row_dims > limit && !u.states[k].is_contiguous())
      refuse(u, "the CUDA kernels take up to ", limit, " dense dimensions of a state that is not ",
             "contiguous, got ", u.param.dim() - row_dims);
  int64_t dim = 1;
  for (int64_t d = row_dims; d < u.param.dim(); ++d) dim *= u.param.size(d);
  if (row_dims > 0 && dim > INT32_MAX)
    refuse(u, "the CUDA kernels take rows of up to ", INT32_MAX, " elements, got ", dim);
}

// The part of a step that one device has. `prepare` and `apply` expect it to be current.
class OneDevice {
 public:
  OneDevice(const StepContext& context, c10::Device device) : device_(device) {
    context_.stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
    context_.grad_scale = pointer<float>(context.grad_scale, at::kFloat);
    context_.found_inf = pointer<float>(context.found_inf, at::kFloat);
    context_.allocate = [this](int64_t bytes) {
      kept_.push_back(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_)));
      return kept_.back().mutable_data_ptr();
    };
  }

  c10::Device device() const { return device_; }

  void add(const Update& u) {
    if (u.indices.defined()) check_rows(u, u.indices.size(0));
    else if (goes_by_rows(u)) check_rows(u, row_dims(u));
    else if (u.last_step.defined() && u.rule.adds && u.param.numel() > 0) {
      check_rows(u, u.last_step.dim());
      lagging_.add_table(u);
    }
    closes_ = closes_ || !u.rule.adds;
    raises_ = raises_ || (u.rule.nonfinite == Nonfinite::kRaise && u.rule.adds);
    builder_.add(u, u.lr.defined() ? learning_rate(u.lr) : nullptr,
                 u.step.defined() ? u.step.mutable_data_ptr<int64_t>() : nullptr);
  }

  void prepare(Faults& faults) {
    prepared_ = true;
    rules_.prepare(builder_.dense(), builder_.rows(), builder_.direct(), builder_.idle(), context_);
    dense_road_.prepare(builder_.dense(), context_);
    if (!builder_.rows().empty()) {
      report_to(faults);
      const FaultMemoryUse use(context_.faults, context_.stream);
      const SortedEntriesCuda sorted =
          plan_rows_cuda(builder_.rows(), builder_.indices(), builder_.row_places(), context_);
      rows_road_.prepare(builder_.rows(), sorted, context_);
    }
    if (raises_) check_finite();
  }

  void apply() {
    if (!prepared_) return;  // only histories of the device advance
    std::vector<RowsToCatchUp> lagging;
    for (const RowsItem& table : lagging_.direct())
      lagging.push_back({&table, nullptr, 0, table.rows});
    catch_up_rows(lagging, context_);
    builder_.start();
    rules_.run();
    dense_road_.run(rules_);
    stamp_dense(builder_.dense(), rules_, context_);
    std::vector<CarefulRows> direct;
    for (size_t i = 0; i < builder_.direct().size(); ++i)
      direct.push_back({&builder_.direct()[i], nullptr, rules_.direct(i), 0});
    update_careful_rows(direct, {}, context_);
    rows_road_.run(rules_);
    builder_.finish();
  }

  void will_advance(const HistoryStep& step, Faults& faults) {
    report_to(faults);
    const double* const lr = step.lr.defined() ? learning_rate(step.lr) : nullptr;
    histories_.push_back(static_cast<HistoryCopyCuda*>(step.copy)->advance(step, lr));
  }
  void will_advance(const at::Tensor& counter) {
    // One that may have advanced in this pass, which closes windows, counts once all the same. (The
    // host has read found_inf where there are windows.)
    if (closes_ && advances(counter.const_data_ptr<int64_t>())) {
      own_counters_.emplace_back(counter, counter.add(1));
      return;
    }
    histories_.push_back({});
    histories_.back().counter = counter.mutable_data_ptr<int64_t>();
  }
  void advance() const {
    for (const auto& [counter, next] : own_counters_) counter.copy_(next);
    if (histories_.empty()) return;
    std::optional<FaultMemoryUse> use;
    if (context_.faults) use.emplace(context_.faults, context_.stream);
    advance_histories(histories_, context_);
  }

 private:
  void report_to(Faults& faults) {
    context_.faults = faults.slot(device_.index(), make_fault_memory);
  }

  // Whether `apply` may advance a counter.
  bool advances(const int64_t* counter) {
    const auto has = [&](const auto& items) {
      return std::any_of(items.begin(), items.end(),
                         [&](const auto& item) { return item.rule.step == counter; });
    };
    return has(builder_.dense()) || has(builder_.rows()) || has(builder_.direct()) ||
           std::any_of(builder_.idle().begin(), builder_.idle().end(),
                       [&](const RuleUse& use) { return use.step == counter; });
  }

  // For nonfinite="raise", the one option for which the host waits.
  void check_finite() {
    int32_t* const bad = static_cast<int32_t*>(context_.allocate(sizeof(int32_t)));
    check_cuda(cudaMemsetAsync(bad, 0x7F, sizeof *bad, context_.stream), "setting memory");
    find_nonfinite(builder_.dense(), bad, context_);
    std::vector<UpdatePlace> places = builder_.dense_places();
    std::vector<CarefulRows> direct;
    for (size_t i = 0; i < builder_.direct().size(); ++i) {
      const RowsItem& item = builder_.direct()[i];
      if (item.rule.params->nonfinite == Nonfinite::kRaise && item.values.data)
        direct.push_back({&item, nullptr, nullptr, static_cast<int32_t>(places.size() + i)});
    }
    find_nonfinite(direct, {}, bad, context_);
    const auto append = [&](const std::vector<UpdatePlace>& more) {
      places.insert(places.end(), more.begin(), more.end());
    };
    append(builder_.direct_places());
    rows_road_.find_nonfinite(bad, static_cast<int32_t>(places.size()));
    append(builder_.row_places());
    int32_t found = 0;
    check_cuda(cudaMemcpyAsync(&found, bad, sizeof found, cudaMemcpyDeviceToHost, context_.stream),
               "copying to the host");
    check_cuda(cudaStreamSynchronize(context_.stream), "waiting for the device");
    if (static_cast<size_t>(found) < places.size()) throw nonfinite_gradient(places[found]);
  }

  // A learning rate in this device's memory.
  const double* learning_rate(const at::Tensor& lr) {
    if (!lr.is_same(lr_source_)) {
      lr_source_ = lr;
      lr_ = pointer<double>(lr, at::kDouble);
    }
    return lr_;
  }

  // One element in this device's memory, copied there if it must be, without waiting.
  template <typename T>
  T* pointer(const at::Tensor& t, at::ScalarType type) {
    if (!t.defined()) return nullptr;
    if (t.numel() != 1)
      throw std::runtime_error(
          "tiger_ext: expected a learning rate, grad_scale or found_inf of "
          "one element, got " +
          std::to_string(t.numel()));
    // What is on the host is read now: its memory may change before the device would copy it.
    kept_.push_back(
        t.is_cpu() && !device_.is_cpu()
            ? at::full({1}, t.item<double>(), at::TensorOptions().dtype(type).device(device_))
            : t.to(device_, type, /*non_blocking=*/true));
    return kept_.back().template mutable_data_ptr<T>();
  }

  c10::Device device_;
  DeviceContext context_;
  ItemBuilder builder_;
  ItemBuilder lagging_;  // tables with strided gradients in a lazy mode
  std::vector<HistoryAdvance> histories_;
  std::vector<std::pair<at::Tensor, at::Tensor>> own_counters_;  // and what they become
  at::Tensor lr_source_;
  const double* lr_ = nullptr;
  bool raises_ = false, closes_ = false, prepared_ = false;
  RulesOnDevice rules_;
  DenseRoadCuda dense_road_;
  RowsRoadCuda rows_road_;
  std::vector<at::Tensor> kept_;  // freed after the launches, which the caching allocator permits
};

class CudaStep final : public DeviceStep {
 public:
  explicit CudaStep(const StepContext& context) : context_(context) {}

  void add(Update& u) override {
    check_update(u);
    // The kernels look at float32 values, where the smallest float64 ones are zero.
    if (u.rule.touched == Touched::kNonzero && u.grad.defined() &&
        u.grad.scalar_type() == at::kDouble && u.param.scalar_type() != at::kDouble) {
      u.mask = u.grad.ne(0).flatten(1).any(1).to(at::kByte);
      u.rule.touched = Touched::kMasked;
    }
    on(u.param.device()).add(u);
  }

  bool lags(const Update&) const override { return false; }  // `apply` looks

  void prepare() override {
    for (const auto& [index, device] : devices_) {
      const c10::cuda::CUDAGuard guard(device->device());
      device->prepare(*context_.faults);
    }
  }

  std::optional<bool> cancelled() const override {
    return context_.found_inf.defined() ? std::nullopt : std::optional(false);
  }

  void apply() override {
    const at::NoGradGuard no_grad;
    for (const auto& [index, device] : devices_) {
      const c10::cuda::CUDAGuard guard(device->device());
      device->apply();
    }
  }

  void will_advance(const std::vector<HistoryStep>& steps,
                    const std::vector<at::Tensor>& counters) override {
    const at::NoGradGuard no_grad;
    for (const HistoryStep& step : steps)
      on(static_cast<HistoryCopyCuda*>(step.copy)->device()).will_advance(step, *context_.faults);
    for (const at::Tensor& counter : counters) on(counter.device()).will_advance(counter);
  }

  void advance() override {
    const at::NoGradGuard no_grad;
    for (const auto& [index, device] : devices_) {
      const c10::cuda::CUDAGuard guard(device->device());
      device->advance();
    }
  }

 private:
  OneDevice& on(c10::Device device) {
    std::unique_ptr<OneDevice>& part = devices_[device.index()];
    if (!part) {
      const c10::cuda::CUDAGuard guard(device);
      part = std::make_unique<OneDevice>(context_, device);
    }
    return *part;
  }

  StepContext context_;
  std::map<c10::DeviceIndex, std::unique_ptr<OneDevice>> devices_;
};

// Whether rows are behind only their clocks know: every call counts as one that writes.
void catch_up(Update& u, const at::Tensor& ids, int64_t begin, int64_t end) {
  const at::NoGradGuard no_grad;
  const c10::Device device = u.param.device();
  const c10::cuda::CUDAGuard guard(device);
  check_table(u, ids, begin, end);
  check_rows(u, u.last_step.dim());
  ItemBuilder builder;
  builder.add_table(u);
  RowsToCatchUp rows{&builder.direct().front(), nullptr, begin, end};
  at::Tensor list;
  if (ids.defined()) {
    list = ids.to(device, at::kLong).contiguous();
    rows = {rows.item, list.const_data_ptr<int64_t>(), 0, list.numel()};
  }
  DeviceContext context;
  context.stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  catch_up_rows({rows}, context);
  builder.finish();
}

const CatchUpRegistration catch_up_registration(c10::DeviceType::CUDA, catch_up);

const DeviceRegistration registration(c10::DeviceType::CUDA, [](const StepContext& context) {
  return std::unique_ptr<DeviceStep>(std::make_unique<CudaStep>(context));
});

}  // namespace
}  // namespace tiger_ext
