// SPDX-License-Identifier: Apache-2.0
//
// Lets the emulated CUDA kernels take the place of the CPU's in this test build of the module.
#include "step/step.h"

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_select(int emulated) {
  using namespace tiger_ext;
  constexpr auto kCpu = c10::DeviceType::CPU, kCuda = c10::DeviceType::CUDA;
  static const auto step = device_step_factory(kCpu);
  static const auto rows = catch_up_function(kCpu);
  DeviceRegistration(kCpu, emulated ? device_step_factory(kCuda) : step);
  CatchUpRegistration(kCpu, emulated ? catch_up_function(kCuda) : rows);
  HistoryCopyRegistration(kCpu, emulated ? history_copy_factory(kCuda) : nullptr);
}
