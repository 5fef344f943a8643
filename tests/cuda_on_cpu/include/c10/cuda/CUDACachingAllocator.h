// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDAStream.h>

namespace c10::cuda::CUDACachingAllocator {

inline void recordStream(const DataPtr&, CUDAStream) {}  // there is one stream

}  // namespace c10::cuda::CUDACachingAllocator
