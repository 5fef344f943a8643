// SPDX-License-Identifier: Apache-2.0
//
// Copies of histories in the memory of CUDA devices. The host makes room for the stretches without
// waiting: the device notes, where the host can read it, how many there were after which call.
#include "cuda/history.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "cuda/fault_memory.h"

namespace tiger_ext {
namespace {

constexpr int64_t kRoom = 1024, kManyRoom = 65536;  // stretches at first
static_assert(sizeof(Stretch) % sizeof(double) == 0);
constexpr int64_t kDoubles = sizeof(Stretch) / sizeof(double);
static_assert(sizeof(HistoryClock) % sizeof(int32_t) == 0);
constexpr int64_t kInts = sizeof(HistoryClock) / sizeof(int32_t);
constexpr int64_t kSteps = offsetof(HistoryClock, steps) / sizeof(int32_t);

// Tensors that outlive an inference_mode in which they were made.
struct OrdinaryTensors {
  c10::InferenceMode off{false};
  at::NoGradGuard no_grad;
};

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
    : device_(device) {
  const OrdinaryTensors ordinary;
  const c10::cuda::CUDAGuard guard(device);
  if (is_capturing())
    throw std::runtime_error(
        "tiger_ext: a lazy mode's history would begin anew in every replay of the graph that is "
        "being captured: take one step before the capture");
  const int64_t count = static_cast<int64_t>(numbers.settings.size());
  const int64_t capacity = std::max(many ? kManyRoom : kRoom, 2 * count);
  note_ = make_note_memory();
  *note_ = static_cast<uint64_t>(count);
  clock_ = at::empty({kInts}, at::TensorOptions().dtype(at::kInt).device(device));
  stretches_ = room(capacity);
  const at::Tensor settings = copied(device, numbers);
  write_history(clock(), stretches(stretches_), static_cast<int32_t>(capacity),
                settings.const_data_ptr<double>(), static_cast<int32_t>(count), numbers.steps,
                stream());
}

void HistoryCopyCuda::reserve(bool many) {
  const c10::cuda::CUDAGuard guard(device_);
  if (is_capturing()) return;  // a replay would move the history each time
  const int64_t capacity = stretches_.size(0);
  int64_t wanted = many ? std::max(capacity, kManyRoom) : capacity;
  // Half of it is for replays.
  while (most() >= (many ? wanted / 2 : wanted)) wanted *= 2;
  if (wanted == capacity) return;
  if (wanted > INT32_MAX) throw std::length_error("tiger_ext: a history is full, call flush()");
  const OrdinaryTensors ordinary;
  const at::Tensor larger = room(wanted);
  larger.narrow(0, 0, capacity).copy_(stretches_);
  move_history(clock(), stretches(larger), static_cast<int32_t>(wanted), stream());
  c10::cuda::CUDACachingAllocator::recordStream(stretches_.storage().data_ptr(),
                                                c10::cuda::getCurrentCUDAStream(device_.index()));
  stretches_ = larger;
}

HistoryAdvance HistoryCopyCuda::advance(const HistoryStep& step, const double* lr_there) {
  const HistorySetting& s = step.setting;
  return {clock(), s.lr,        lr_there, s.weight_decay, s.beta1,
          s.beta2, ++sequence_, note_,    nullptr,        step.place};
}

// There are no more stretches than this, but for those of replays.
int64_t HistoryCopyCuda::most() const {
  const uint64_t note = *static_cast<volatile uint64_t*>(note_);
  return static_cast<int64_t>(note & UINT32_MAX) +
         static_cast<uint32_t>(sequence_ - static_cast<uint32_t>(note >> 32));
}

at::Tensor HistoryCopyCuda::steps() const {
  const OrdinaryTensors ordinary;
  return clock_.select(0, kSteps).clone();
}

void HistoryCopyCuda::forget() {
  const c10::cuda::CUDAGuard guard(device_);
  clear_history(clock(), stream());
}

HistoryNumbers HistoryCopyCuda::read() {
  const OrdinaryTensors ordinary;
  const at::Tensor copy = clock_.cpu();
  const auto& clock = *reinterpret_cast<const HistoryClock*>(copy.const_data_ptr<int32_t>());
  if (clock.lost > 0)
    throw std::runtime_error(
        "tiger_ext: the replays of a graph changed the hyperparameters of a lazy mode more often "
        "than there was room for (" +
        std::to_string(clock.capacity) + " times): call flush() more often");
  HistoryNumbers numbers;
  numbers.steps = clock.steps;
  const at::Tensor host = stretches_.narrow(0, 0, clock.count).cpu();
  const auto* const all = reinterpret_cast<const Stretch*>(host.const_data_ptr<double>());
  for (int32_t k = 0; k < clock.count; ++k)
    numbers.settings.push_back(
        {all[k].first, all[k].lr, all[k].weight_decay, all[k].beta1, all[k].beta2});
  return numbers;
}

bool HistoryCopyCuda::is_capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream(), &status);
  return status != cudaStreamCaptureStatusNone;
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
