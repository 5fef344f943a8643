// SPDX-License-Identifier: Apache-2.0
//
// The leaf kernels for AVX512. The target region opens after every other header, so that no inline
// function shared with other files is compiled for an instruction set they may not have.
#include "cpu/kernels/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 warns of its own header's undefined vectors, which no lane of a result comes from.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define TIGER_EXT_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace tiger_ext {
namespace avx512 {
#include "cpu/kernels/kernels.inl"
}  // namespace avx512

const CpuKernels kernels_avx512 = avx512::table("avx512");
}  // namespace tiger_ext

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
