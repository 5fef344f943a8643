// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <vector>

#include "group_history.h"
#include "lazy_cuda.h"
#include "step.h"

namespace tiger_ext {

// A history in the memory of a CUDA device.
class HistoryCopyCuda final : public HistoryCopy {
 public:
  HistoryCopyCuda(c10::Device device, const HistoryNumbers& numbers, bool many);

  c10::Device device() const { return device_; }
  void reserve() override;
  void use(RuleParams& rule) const override;
  // Work for advance_histories. `reserve` has made room. `lr_there`: where the learning rate lies
  // in the device's memory, or null.
  HistoryAdvance advance(const HistoryStep& step, const double* lr_there);
  at::Tensor steps() const override;
  void forget() override;
  HistoryNumbers read() override;

 private:
  at::Tensor room(int64_t capacity) const;
  cudaStream_t stream() const;
  HistoryClock* clock() const {
    return reinterpret_cast<HistoryClock*>(clock_.mutable_data_ptr<int32_t>());
  }
  Stretch* stretches() const {
    return reinterpret_cast<Stretch*>(stretches_.mutable_data_ptr<double>());
  }

  c10::Device device_;
  at::Tensor clock_;      // a HistoryClock
  at::Tensor stretches_;  // [capacity, a Stretch]
  int64_t capacity_ = 0;
  int64_t most_;  // there are no more stretches than this
  HistorySetting last_;
  bool captured_ = false;
  std::vector<at::Tensor> outgrown_;  // which kernels on another stream may still read
};

}  // namespace tiger_ext
