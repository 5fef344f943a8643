// SPDX-License-Identifier: Apache-2.0
//
// Copies of histories in the memory of CUDA devices. The host never waits for the number of
// stretches: it knows a bound, and makes room by that.
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "history_cuda.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace tiger_ext {
namespace {

constexpr int64_t kRoom = 1024, kManyRoom = 65536;  // stretches at first
constexpr int64_t kMostRoom = INT32_MAX;
static_assert(sizeof(Stretch) % sizeof(double) == 0);
constexpr int64_t kDoubles = sizeof(Stretch) / sizeof(double);

at::Tensor copied(c10::Device device, const HistoryNumbers& numbers) {
  const int64_t count = static_cast<int64_t>(numbers.settings.size());
  const at::Tensor host = at::empty({count, 5}, at::kDouble);
  double* out = host.mutable_data_ptr<double>();
  for (const HistorySetting& s : numbers.settings)
    for (const double x : {static_cast<double>(s.first), s.lr, s.weight_decay, s.beta1, s.beta2})
      *out++ = x;
  return host.to(device, /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace

HistoryCopyCuda::HistoryCopyCuda(c10::Device device, const HistoryNumbers& numbers, bool many)
    : device_(device), most_(static_cast<int64_t>(numbers.settings.size())) {
  const at::NoGradGuard no_grad;
  const c10::cuda::CUDAGuard guard(device);
  capacity_ = std::max(many ? kManyRoom : kRoom, 2 * most_);
  clock_ = at::empty({2}, at::TensorOptions().dtype(at::kInt).device(device));
  stretches_ = room(capacity_);
  const at::Tensor settings = copied(device, numbers);
  write_history(clock(), stretches(), settings.const_data_ptr<double>(),
                static_cast<int32_t>(most_), numbers.steps, stream());
  if (most_ > 0) last_ = numbers.settings.back();
}

void HistoryCopyCuda::use(RuleParams& rule) const {
  rule.clock = clock();
  rule.stretches = stretches();
}

void HistoryCopyCuda::reserve() {
  const c10::cuda::CUDAGuard guard(device_);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream(), &status);
  // A graph goes on writing to this memory; only its kernels know how much of it is used.
  captured_ = captured_ || status != cudaStreamCaptureStatusNone;
  if (captured_ || most_ < capacity_) return;
  if (capacity_ == kMostRoom) throw std::length_error("tiger_ext: a history is full, call flush()");
  const at::NoGradGuard no_grad;
  const int64_t capacity = std::min(2 * capacity_, kMostRoom);
  at::Tensor larger = room(capacity);
  larger.narrow(0, 0, capacity_).copy_(stretches_);
  outgrown_.push_back(stretches_);
  stretches_ = larger;
  capacity_ = capacity;
}

HistoryAdvance HistoryCopyCuda::advance(const HistoryStep& step, const double* lr_there) {
  const HistorySetting& now = step.setting;
  if (lr_there || most_ == 0 || !last_.same(now)) ++most_;
  last_ = now;
  if (lr_there) last_.lr = std::numeric_limits<double>::quiet_NaN();  // the same as no other
  return {clock(),   stretches(), static_cast<int32_t>(capacity_),
          now.lr,    lr_there,    now.weight_decay,
          now.beta1, now.beta2,   nullptr,
          step.place};
}

at::Tensor HistoryCopyCuda::steps() const {
  const at::NoGradGuard no_grad;
  return clock_.select(0, 0).clone();
}

void HistoryCopyCuda::forget() {
  const at::NoGradGuard no_grad;
  clock_.select(0, 1).zero_();
  most_ = 0;
}

HistoryNumbers HistoryCopyCuda::read() {
  const at::NoGradGuard no_grad;
  const at::Tensor clock = clock_.cpu();
  HistoryNumbers numbers;
  numbers.steps = clock.const_data_ptr<int32_t>()[0];
  const int32_t count = clock.const_data_ptr<int32_t>()[1];
  const at::Tensor host = stretches_.narrow(0, 0, count).cpu();
  const auto* const all = reinterpret_cast<const Stretch*>(host.const_data_ptr<double>());
  for (int32_t k = 0; k < count; ++k)
    numbers.settings.push_back(
        {all[k].first, all[k].lr, all[k].weight_decay, all[k].beta1, all[k].beta2});
  most_ = count;
  if (count > 0) last_ = numbers.settings.back();
  outgrown_.clear();
  return numbers;
}

at::Tensor HistoryCopyCuda::room(int64_t capacity) const {
  return at::empty({capacity, kDoubles}, at::TensorOptions().dtype(at::kDouble).device(device_));
}

cudaStream_t HistoryCopyCuda::stream() const {
  return c10::cuda::getCurrentCUDAStream(device_.index()).stream();
}

namespace {

const HistoryCopyRegistration registration(c10::DeviceType::CUDA, [](c10::Device device,
                                                                     const HistoryNumbers& numbers,
                                                                     bool many) {
  return std::unique_ptr<HistoryCopy>(std::make_unique<HistoryCopyCuda>(device, numbers, many));
});

}  // namespace
}  // namespace tiger_ext
