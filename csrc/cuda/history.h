// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include "cuda/lazy.h"
#include "step/group_history.h"
#include "step/step.h"

namespace tiger_ext {

// A history in the memory of a CUDA device.
class HistoryCopyCuda final : public HistoryCopy {
 public:
  HistoryCopyCuda(c10::Device device, const HistoryNumbers& numbers, bool many);

  c10::Device device() const { return device_; }
  void reserve(bool many) override;
  void use(RuleParams& rule) const override { rule.clock = clock(); }
  // Work for advance_histories. `reserve` has made room. `lr_there`: where the learning rate lies
  // in the device's memory, or null.
  HistoryAdvance advance(const HistoryStep& step, const double* lr_there);
  at::Tensor steps() const override;
  void forget() override;
  HistoryNumbers read() override;

 private:
  bool is_capturing() const;
  int64_t most() const;
  at::Tensor room(int64_t capacity) const;
  cudaStream_t stream() const;
  HistoryClock* clock() const {
    return reinterpret_cast<HistoryClock*>(clock_.mutable_data_ptr<int32_t>());
  }
  static Stretch* stretches(const at::Tensor& room) {
    return reinterpret_cast<Stretch*>(room.mutable_data_ptr<double>());
  }

  c10::Device device_;
  at::Tensor clock_;       // a HistoryClock
  at::Tensor stretches_;   // [capacity, a Stretch]
  uint64_t* note_;         // of the last call of `advance` that the device has done
  uint32_t sequence_ = 0;  // of the last call
};

}  // namespace tiger_ext
