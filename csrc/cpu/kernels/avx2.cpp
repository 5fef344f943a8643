// SPDX-License-Identifier: Apache-2.0
//
// The leaf kernels for AVX2. The target region opens after every other header, so that no inline
// function shared with other files is compiled for an instruction set they may not have.
#include "cpu/kernels/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TIGER_EXT_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace tiger_ext {
namespace avx2 {
#include "cpu/kernels/kernels.inl"
}  // namespace avx2

const CpuKernels kernels_avx2 = avx2::table("avx2");
}  // namespace tiger_ext

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
