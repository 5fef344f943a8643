// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(expression)                                            \
  do {                                                                        \
    const cudaError_t c10_cuda_error = (expression);                          \
    if (c10_cuda_error != cudaSuccess) {                                      \
      (void)cudaGetLastError();                                               \
      TORCH_CHECK(false, "CUDA error: ", cudaGetErrorString(c10_cuda_error)); \
    }                                                                         \
  } while (false)

#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
