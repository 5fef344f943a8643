// SPDX-License-Identifier: Apache-2.0
//
// Loads and stores of kWidth neighbouring elements as one access, converted to and from the
// arithmetic type. The storage type is either fixed at compile time or looked up per tensor.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "step/items.h"

namespace tiger_ext {

// A storage type known to the compiler: the switches below fold away.
template <Storage kStorage>
struct Fixed {
  static TIGER_EXT_INLINE Storage storage(Storage) { return kStorage; }
};

// A storage type that differs from tensor to tensor.
struct Any {
  static TIGER_EXT_INLINE Storage storage(Storage s) { return s; }
};

// The widest access that kBytes bytes allow.
template <int kBytes>
using Word =
    std::conditional_t<kBytes % 16 == 0, uint4,
                       std::conditional_t<kBytes % 8 == 0, uint2,
                                          std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>>>;

// One access. nvcc was seen to split the plain assignment into four of 4 bytes.
template <typename W>
__device__ __forceinline__ void store_word(W* p, W x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(W) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z),
                 "r"(x.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(W) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory");
    return;
  }
#endif
  *p = x;
}

template <typename T, int kWidth, typename S>
__device__ __forceinline__ void load_packed(const S* source, bool aligned, T (&out)[kWidth]) {
  constexpr int kBytes = sizeof(S) * kWidth;
  using W = Word<kBytes>;
  constexpr int kWords = kBytes / sizeof(W);
  S elements[kWidth];
  if (aligned) {
    W words[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = reinterpret_cast<const W*>(source)[k];
    memcpy(elements, words, kBytes);
  } else {
#pragma unroll
    for (int w = 0; w < kWidth; ++w) elements[w] = source[w];
  }
#pragma unroll
  for (int w = 0; w < kWidth; ++w) out[w] = load_element<T>(elements[w]);
}

template <typename T, int kWidth, typename S>
__device__ __forceinline__ void store_packed(S* target, bool aligned, const T (&in)[kWidth]) {
  constexpr int kBytes = sizeof(S) * kWidth;
  using W = Word<kBytes>;
  constexpr int kWords = kBytes / sizeof(W);
  S elements[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth; ++w) store_element<T>(&elements[w], in[w]);
  if (aligned) {
    W words[kWords];
    memcpy(words, elements, kBytes);
#pragma unroll
    for (int k = 0; k < kWords; ++k) store_word(reinterpret_cast<W*>(target) + k, words[k]);
  } else {
#pragma unroll
    for (int w = 0; w < kWidth; ++w) target[w] = elements[w];
  }
}

// Elements [offset, offset + kWidth) of a stream. `aligned`: the address is a multiple of the
// vector's size.
template <typename Access, typename T, int kWidth>
__device__ __forceinline__ void load_vector(const Stream& s, int64_t offset, bool aligned,
                                            T (&out)[kWidth]) {
  switch (Access::storage(s.storage)) {
    case Storage::kFloat32:
      return load_packed(static_cast<const float*>(s.data) + offset, aligned, out);
    case Storage::kFloat64:
      return load_packed(static_cast<const double*>(s.data) + offset, aligned, out);
    case Storage::kBFloat16:
      return load_packed(static_cast<const BFloat16*>(s.data) + offset, aligned, out);
    default:  // float16: a momentum in int8 goes through compact.cuh
      break;
  }
  load_packed(static_cast<const Float16*>(s.data) + offset, aligned, out);
}

template <typename Access, typename T, int kWidth>
__device__ __forceinline__ void store_vector(const Stream& s, int64_t offset, bool aligned,
                                             const T (&in)[kWidth]) {
  switch (Access::storage(s.storage)) {
    case Storage::kFloat32:
      return store_packed(static_cast<float*>(s.data) + offset, aligned, in);
    case Storage::kFloat64:
      return store_packed(static_cast<double*>(s.data) + offset, aligned, in);
    case Storage::kBFloat16:
      return store_packed(static_cast<BFloat16*>(s.data) + offset, aligned, in);
    default:  // float16: a momentum in int8 goes through compact.cuh
      break;
  }
  store_packed(static_cast<Float16*>(s.data) + offset, aligned, in);
}

// One step of kWidth elements in registers.
template <typename Rule, typename T, int kWidth>
__device__ __forceinline__ void apply_rule(const Rule& rule, const T (&grad)[kWidth],
                                           T (&param)[kWidth], T (&states)[Rule::kStates][kWidth]) {
  if constexpr (Rule::kDirected) {
    rule.with_direction([&]<Direction kDirection>() {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        if (rule.moves) rule.template update<kDirection, true>(grad[w], param[w], states[0][w]);
        else rule.template update<kDirection, false>(grad[w], param[w], states[0][w]);
      }
    });
  } else {
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      if constexpr (Rule::kStates == 1) rule(grad[w], param[w], states[0][w]);
      else rule(grad[w], param[w], states[0][w], states[1][w]);
    }
  }
}

}  // namespace tiger_ext
