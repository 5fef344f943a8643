// SPDX-License-Identifier: Apache-2.0
//
// The leaf kernels for the compiler's default target: SSE2 on x86-64, NEON on aarch64.
#include "cpu/kernels/kernels.h"

namespace tiger_ext {
namespace baseline {
#include "cpu/kernels/kernels.inl"
}  // namespace baseline

const CpuKernels kernels_baseline = baseline::table("baseline");
}  // namespace tiger_ext
