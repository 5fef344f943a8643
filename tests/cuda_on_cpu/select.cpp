// SPDX-License-Identifier: Apache-2.0
//
// Lets the emulated CUDA kernels take the place of the CPU's in this test build of the module.
#include "step.h"

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_select(int emulated) {
  using tiger_ext::device_step_factory;
  static const tiger_ext::DeviceStepFactory native = device_step_factory(c10::DeviceType::CPU);
  tiger_ext::DeviceRegistration(c10::DeviceType::CPU,
                                emulated ? device_step_factory(c10::DeviceType::CUDA) : native);
}
