// SPDX-License-Identifier: Apache-2.0
//
// Chooses the leaf kernels at run time: one wheel starts on any x86-64 and uses what it finds.
#include "cpu/kernels/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace tiger_ext {
namespace {

std::vector<const CpuKernels*> runnable_kernels() {  // best first
  std::vector<const CpuKernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&kernels_avx512);
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_baseline);
  return found;
}

const CpuKernels& choose() {
  const std::vector<const CpuKernels*> found = runnable_kernels();
  const char* wanted = std::getenv("TIGER_EXT_CPU_ISA");
  if (!wanted || !*wanted) return *found.front();
  std::string names;
  for (const CpuKernels* k : found) {
    if (std::string(wanted) == k->name) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("TIGER_EXT_CPU_ISA=" + std::string(wanted) +
                           " is not available here; this processor runs: " + names);
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace tiger_ext
