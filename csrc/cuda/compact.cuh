// SPDX-License-Identifier: Apache-2.0
//
// State that costs little, in units: a row, or kRoundingBlock elements that are neighbours in
// memory. A unit's momentum in int8 has a scale, its second moment may be one number, and what is
// rounded stochastically has its random bits. One group of lanes has the whole unit.
#pragma once

#include "cuda/lazy_rows.cuh"
#include "cuda/row_tables.cuh"
#include "cuda/vectors.cuh"

namespace tiger_ext {

// What of that one table or tensor has.
template <typename T>
struct CompactState {
  float* scales;         // of a momentum in int8, or null
  int64_t block_scales;  // how many, if not one a unit (RowsItem)
  T* row_moment;         // one a unit, or null
  uint64_t seed;
  int64_t position;
  const int64_t* steps;  // the counter in device memory; null: it only catches up
  bool rounds_param;

  CompactState() = default;
  CompactState(const Rounding& rounding, float* scales, int64_t block_scales, void* row_moment)
      : scales(scales),
        block_scales(block_scales),
        row_moment(static_cast<T*>(row_moment)),
        seed(rounding.seed),
        position(rounding.position),
        steps(rounding.steps),
        rounds_param(rounding.param) {}

  __device__ uint64_t key(RoundedStream stream, int64_t step) const {
    return rounding_key(seed, stream, step, position);
  }
};

// The lanes of a warp that have one unit, seen by one of them.
struct UnitLanes {
  int count;  // a power of two
  int own;
  unsigned mask;

  __device__ explicit UnitLanes(int lanes) : count(lanes) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    own = lane % lanes;
    mask = lanes == kWarp ? kFullWarp : ((1u << lanes) - 1) << (lane - own);
  }

  __device__ uint32_t largest(uint32_t x) const {
    for (int distance = count / 2; distance > 0; distance /= 2) {
      const uint32_t other = __shfl_xor_sync(mask, x, distance);
      x = other > x ? other : x;
    }
    return x;
  }
};

// How many of a unit's lanes there are, for vectors of `width` elements.
inline int lanes_of_unit(int64_t dim, int width, int least) {
  int lanes = least;
  while (lanes < kWarp && lanes * width < dim) lanes *= 2;
  return lanes;
}

// ------------------------------------------------------------------------------ loads and stores

template <typename T, int kWidth>
__device__ __forceinline__ void load_scaled(const Stream& s, int64_t offset, float scale,
                                            T (&out)[kWidth]) {
  const int8_t* const source = static_cast<const int8_t*>(s.data) + offset;
  if constexpr (kWidth % 2 == 0) {
    load_packed(source, true, out);
  } else {
#pragma unroll
    for (int w = 0; w < kWidth; ++w) out[w] = load_element<T>(source[w]);
  }
#pragma unroll
  for (int w = 0; w < kWidth; ++w) out[w] *= static_cast<T>(scale);
}

// As vectors: S is a storage type whose elements are ready.
template <typename S, int kWidth>
__device__ __forceinline__ void store_ready(S* target, const S (&elements)[kWidth]) {
  constexpr int kBytes = sizeof(S) * kWidth;
  if constexpr (kBytes % 2 == 0) {
    using W = Word<kBytes>;
    constexpr int kWords = kBytes / sizeof(W);
    W words[kWords];
    memcpy(words, elements, kBytes);
#pragma unroll
    for (int k = 0; k < kWords; ++k) store_word(reinterpret_cast<W*>(target) + k, words[k]);
  } else {
#pragma unroll
    for (int w = 0; w < kWidth; ++w) target[w] = elements[w];
  }
}

// Elements `first`, first + 1, ... of a unit whose new scale is given.
template <typename T, int kWidth>
__device__ __forceinline__ void store_quantised(const Stream& s, int64_t offset, float scale,
                                                const RandomUnit& random, int64_t first,
                                                const T (&in)[kWidth]) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;  // 0: nothing, or not finite
  int8_t q[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth; ++w)
    q[w] = inverse == 0.0f
               ? int8_t{0}
               : static_cast<int8_t>(quantised(static_cast<float>(in[w]), inverse,
                                               random(static_cast<uint32_t>(first + w))));
  store_ready(static_cast<int8_t*>(s.data) + offset, q);
}

template <typename Half, typename T, int kWidth>
__device__ __forceinline__ void store_rounded_as(void* data, int64_t offset,
                                                 const RandomUnit& random, int64_t first,
                                                 const T (&in)[kWidth]) {
  Half halves[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth; ++w)
    halves[w] =
        rounded_to<Half>(static_cast<float>(in[w]), random(static_cast<uint32_t>(first + w)));
  store_ready(static_cast<Half*>(data) + offset, halves);
}

// A parameter's elements `first`, first + 1, ... of a unit.
template <typename T, int kWidth>
__device__ __forceinline__ void store_param(const Stream& s, int64_t offset, bool rounds,
                                            const RandomUnit& random, int64_t first,
                                            const T (&in)[kWidth]) {
  if constexpr (sizeof(T) == 4) {
    if (rounds && s.storage == Storage::kBFloat16)
      return store_rounded_as<BFloat16>(s.data, offset, random, first, in);
    if (rounds) return store_rounded_as<Float16>(s.data, offset, random, first, in);
  }
  store_vector<Any>(s, offset, true, in);
}

// --------------------------------------------------------------------------------- skipped steps

// How large an array is that holds this many states.
template <int kStates>
constexpr int kSlots = kStates > 0 ? kStates : 1;

// What one unit has missed, with the number that its row has in a state counted in.
template <typename T, int kStates, bool kRowMoment>
__device__ void look_up_gap(const LazyTable& lazy, int32_t last, const Stream* states,
                            RowGap<T>& gap) {
  constexpr int kCount = kStates + (kRowMoment ? 1 : 0);
  T floors[kCount];
#pragma unroll
  for (int k = 0; k < kStates; ++k) floors[k] = smallest_kept<T>(states[k].storage);
  if constexpr (kRowMoment)
    floors[kStates] = smallest_kept<T>(sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32);
  gap.template look_up_with<kCount>(lazy, last, floors);
}

template <int kStates, typename T, int kWidth>
__device__ __forceinline__ void catch_up_elements(const CatchUp<T>& missed, bool drifts,
                                                  T (&param)[kWidth],
                                                  T (&states)[kSlots<kStates>][kWidth]) {
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    if constexpr (kStates > 0) {
      if (drifts) missed.template param<true>(param[w], states[0][w]);
      else missed.template param<false>(param[w], T(0));
      missed.template state<0>(states[0][w]);
      if constexpr (kStates == 2) missed.template state<1>(states[1][w]);
    } else {
      missed.template param<false>(param[w], T(0));
    }
  }
}

template <typename T>
__device__ __forceinline__ float decayed_scale(const CatchUp<T>& missed, float scale) {
  T s = static_cast<T>(scale);
  missed.template state<0>(s);
  return static_cast<float>(s);
}

// Brings a row up to date that has no gradient. Not its clock. It is a momentum's scale that
// decays, not its numbers.
template <typename T, int kStates, bool kRowMoment, int kWidth, typename Rows>
__device__ void catch_up_row(const LazyTable& lazy, const CompactState<T>& compact,
                             const Stream* streams, const Rows* rows, int64_t row, int64_t dim,
                             const UnitLanes& lanes, CatchUp<T> missed) {
  const CatchUp<T> of_units = missed;
  const bool scaled = kStates > 0 && compact.scales;
  const bool by_blocks = compact.block_scales > 0;
  float scale = scaled && !by_blocks ? decayed_scale(of_units, compact.scales[row]) : 0.0f;
  if (scaled) missed.factor[0] = T(1);
  const RandomUnit random(compact.key(RoundedStream::kParamCaughtUp, lazy.current()), row);
  for (int64_t c = lanes.own * kWidth; c < dim; c += lanes.count * kWidth) {
    T param[kWidth], states[kSlots<kStates>][kWidth];
    load_vector<Any>(streams[0], rows[0].offset(row, c), true, param);
    if constexpr (kStates > 0) {
      if (by_blocks) scale = decayed_scale(of_units, compact.scales[c / kRoundingBlock]);
      if (scaled) load_scaled(streams[1], rows[1].offset(row, c), scale, states[0]);
      else load_vector<Any>(streams[1], rows[1].offset(row, c), true, states[0]);
    }
    if constexpr (kStates == 2)
      load_vector<Any>(streams[2], rows[2].offset(row, c), true, states[1]);
    catch_up_elements<kStates>(missed, lazy.drifts, param, states);
    store_param(streams[0], rows[0].offset(row, c), compact.rounds_param, random, c, param);
    if constexpr (kStates > 0)
      if (!scaled) store_vector<Any>(streams[1], rows[1].offset(row, c), true, states[0]);
    if constexpr (kStates == 2)
      store_vector<Any>(streams[2], rows[2].offset(row, c), true, states[1]);
  }
  __syncwarp(lanes.mask);  // all lanes have read the scales
  if (scaled && by_blocks) {
    for (int64_t k = lanes.own; k < compact.block_scales; k += lanes.count)
      compact.scales[k] = decayed_scale(of_units, compact.scales[k]);
  } else if (scaled && lanes.own == 0) {
    compact.scales[row] = scale;
  }
  if constexpr (kRowMoment)
    if (lanes.own == 0) of_units.template state<kStates>(compact.row_moment[row]);
  __syncwarp(lanes.mask);
}

}  // namespace tiger_ext
