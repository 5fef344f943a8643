// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: kLanes elements at a time from and to any storage type, which the compiler
// keeps in registers between loading, computing and storing. bfloat16 and float16 are converted by
// the processor's own instructions where the compiler would not find them; the bits are those of
// storage.h, but for a NaN's payload. (vcvtneps2bf16 would take subnormal numbers for zero.)

template <typename T, typename S>
TIGER_EXT_INLINE void load_lanes(const S* in, T* out) {
  for (int l = 0; l < kLanes; ++l) out[l] = load_element<T>(in[l]);
}
template <typename T, typename S>
TIGER_EXT_INLINE void store_lanes(const T* in, S* out) {
  for (int l = 0; l < kLanes; ++l) store_element<T>(out + l, in[l]);
}

#if defined(TIGER_EXT_AVX512)

TIGER_EXT_INLINE void load_lanes(const BFloat16* in, float* out) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  _mm512_storeu_ps(out, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)));
}

TIGER_EXT_INLINE void load_lanes(const Float16* in, float* out) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  _mm512_storeu_ps(out, _mm512_cvtph_ps(h));
}

// A NaN is not rounded, which could make it a number; what arithmetic makes has its quiet bit in
// the upper half.
TIGER_EXT_INLINE void store_lanes(const float* in, BFloat16* out) {
  const __m512 x = _mm512_loadu_ps(in);
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_mask_add_epi32(u, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), u, half);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

TIGER_EXT_INLINE void load_lanes(const int8_t* in, float* out) {
  const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  _mm512_storeu_ps(out, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)));
}

TIGER_EXT_INLINE void store_lanes(const float* in, Float16* out) {
  const __m512 x = _mm512_loadu_ps(in);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Of each the lower half, or the lowest byte.
TIGER_EXT_INLINE void store_low_lanes(const uint32_t* in, uint16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtepi32_epi16(_mm512_loadu_si512(in)));
}
TIGER_EXT_INLINE void store_low_lanes(const int32_t* in, int8_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_loadu_si512(in)));
}

#elif defined(TIGER_EXT_AVX2)

TIGER_EXT_INLINE void load_lanes(const BFloat16* in, float* out) {
  for (int l = 0; l < kLanes; l += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + l));
    const __m256i u = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
    _mm256_storeu_ps(out + l, _mm256_castsi256_ps(u));
  }
}

TIGER_EXT_INLINE void load_lanes(const Float16* in, float* out) {
  for (int l = 0; l < kLanes; l += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + l));
    _mm256_storeu_ps(out + l, _mm256_cvtph_ps(h));
  }
}

TIGER_EXT_INLINE void load_lanes(const int8_t* in, float* out) {
  for (int l = 0; l < kLanes; l += 8) {
    const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + l));
    _mm256_storeu_ps(out + l, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)));
  }
}

TIGER_EXT_INLINE __m256i rounded_to_bfloat16(__m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i high = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, half), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x0040));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

TIGER_EXT_INLINE void store_lanes(const float* in, BFloat16* out) {
  const __m256i low = rounded_to_bfloat16(_mm256_loadu_ps(in));
  const __m256i high = rounded_to_bfloat16(_mm256_loadu_ps(in + 8));
  // The packing goes by halves of the vectors.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8));
}

TIGER_EXT_INLINE void store_lanes(const float* in, Float16* out) {
  for (int l = 0; l < kLanes; l += 8) {
    const __m256 x = _mm256_loadu_ps(in + l);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + l),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

// The packing goes by halves of the vectors.
TIGER_EXT_INLINE __m256i low_halves(const void* in) {
  const __m256i mask = _mm256_set1_epi32(0xFFFF);
  const __m256i* const lanes = static_cast<const __m256i*>(in);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(_mm256_loadu_si256(lanes), mask),
                                             _mm256_and_si256(_mm256_loadu_si256(lanes + 1), mask));
  return _mm256_permute4x64_epi64(packed, 0xD8);
}
TIGER_EXT_INLINE void store_low_lanes(const uint32_t* in, uint16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), low_halves(in));
}
TIGER_EXT_INLINE void store_low_lanes(const int32_t* in, int8_t* out) {
  const __m256i halves = low_halves(in);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
}

#else

// Of each the lower half, or the lowest byte.
TIGER_EXT_INLINE void store_low_lanes(const uint32_t* in, uint16_t* out) {
  for (int l = 0; l < kLanes; ++l) out[l] = static_cast<uint16_t>(in[l]);
}
TIGER_EXT_INLINE void store_low_lanes(const int32_t* in, int8_t* out) {
  for (int l = 0; l < kLanes; ++l) out[l] = static_cast<int8_t>(in[l]);
}

#endif

// The compiler's vectors, as wide as the processor's, where it would not find them in a loop.
#if defined(TIGER_EXT_AVX512)
constexpr int kWidth = 16;
#elif defined(TIGER_EXT_AVX2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
using FloatLanes = float __attribute__((vector_size(kWidth * 4)));
using IntLanes = int32_t __attribute__((vector_size(kWidth * 4)));
using BitLanes = uint32_t __attribute__((vector_size(kWidth * 4)));

template <typename To, typename From>
TIGER_EXT_INLINE void copy_lanes(const From& from, To& to) {
  static_assert(sizeof(From) == sizeof(To));
  memcpy(&to, &from, sizeof to);
}

// See `sign` in update_rules.h.
TIGER_EXT_INLINE void sign_lanes(const FloatLanes& a, FloatLanes& s) {
#if defined(TIGER_EXT_AVX512)
  // By a number's class: NaN, signalling NaN, 0, 1, -Inf, Inf, below 0, above 0.
  const __m512i signs = _mm512_set1_epi32(static_cast<int>(0xA9A9A822u));
  s = _mm512_fixupimm_ps(a, a, signs, 0);
#else
  BitLanes u;
  copy_lanes(a, u);
  IntLanes bits;
  copy_lanes((u & 0x80000000u) | 0x3F800000u, bits);
  bits = (bits & (a != 0.0f)) | (a != a);
  copy_lanes(bits, s);
#endif
}

// SignMomentum's operator(), whose loop the compiler does not make as short.
TIGER_EXT_INLINE void apply_to_lanes(const SignMomentum<float>& rule, const FloatLanes& grad,
                                     FloatLanes& p, FloatLanes& m) {
  const FloatLanes g = rule.grad_factor * grad;
  FloatLanes direction;
  sign_lanes(rule.beta1 * m + rule.weight1 * g, direction);
  p = rule.decay * p - rule.lr * direction;
  m = rule.beta2 * m + rule.weight2 * g;
}

template <typename Rule>
constexpr bool kTakesLanes = std::is_same_v<Rule, SignMomentum<float>>;

// Pairs of bfloat16, as numbers of 32 bits: half of the lanes at even places, half at odd ones.
TIGER_EXT_INLINE void bfloat16_pairs(const BFloat16* in, FloatLanes& even, FloatLanes& odd) {
  BitLanes u;
  memcpy(&u, in, sizeof u);
  copy_lanes(u << 16, even);
  copy_lanes(u & 0xFFFF0000u, odd);
}

// With the rounded number in the upper half. A NaN is kept, see `store_lanes`.
TIGER_EXT_INLINE void round_upper_half(const FloatLanes& a, BitLanes& u) {
  copy_lanes(a, u);
#if defined(TIGER_EXT_AVX512)
  __m512i x;
  copy_lanes(a, x);
  const __mmask16 odd = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000));
  const __m512i half =
      _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7FFF), _mm512_set1_epi32(0x8000));
  copy_lanes(_mm512_mask_add_epi32(x, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), x, half), u);
#else
  u = a == a ? u + 0x7FFFu + (u >> 16 & 1u) : u;
#endif
}

TIGER_EXT_INLINE void store_upper_halves(const BitLanes& even, const BitLanes& odd, BFloat16* out) {
  const BitLanes u = even >> 16 | (odd & 0xFFFF0000u);
  memcpy(out, &u, sizeof u);
}

// RandomUnit::of_pair of k, k + 1, ...
template <typename AnyLanes>
TIGER_EXT_INLINE void random_pairs(const RandomUnit& random, int64_t k, AnyLanes& x) {
  alignas(kCacheLine) static constexpr uint32_t kPlaces[] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                             8, 9, 10, 11, 12, 13, 14, 15};
  memcpy(&x, kPlaces, sizeof x);
  x = x * RandomUnit::kStep + (static_cast<uint32_t>(k) * RandomUnit::kStep + random.low);
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= random.high;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
}

// The random bits of elements c, c + 1, ..., with c even.
TIGER_EXT_INLINE void random_lanes(const RandomUnit& random, int64_t c, uint32_t* out) {
  uint32_t pairs __attribute__((vector_size(kLanes * 2)));
  random_pairs(random, c / 2, pairs);
  uint16_t bits[kLanes];
  memcpy(bits, &pairs, sizeof bits);
  for (int l = 0; l < kLanes; ++l) out[l] = bits[l];
}

// The same with the stochastically rounded numbers; `random`: their bits.
TIGER_EXT_INLINE void round_upper_half(const FloatLanes& a, const BitLanes& random, BitLanes& u) {
  copy_lanes(a, u);
  u = a == a ? u + random : u;
}

// See round_bfloat16.
TIGER_EXT_INLINE void round_lanes(const FloatLanes& x, const BitLanes& random, BitLanes& half,
                                  BFloat16*) {
  BitLanes u;
  copy_lanes(x, u);
  half = x != x ? u >> 16 | 0x0040u : (u + random) >> 16;
}

// See round_float16.
TIGER_EXT_INLINE void round_lanes(const FloatLanes& x, const BitLanes& random, BitLanes& half,
                                  Float16*) {
  BitLanes u;
  copy_lanes(x, u);
  const BitLanes sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu, draw = random >> 3;
  const BitLanes rounded = (magnitude - (112u << 23) + draw) >> 13,
                 infinite = rounded - rounded + 0x7C00u;
  const BitLanes normal = magnitude >= 0x47800000u ? infinite
                          : rounded >= 0x7C00u     ? infinite
                                                   : rounded;
  FloatLanes size;
  copy_lanes(magnitude, size);
  IntLanes whole;
  copy_lanes(draw, whole);
  const auto small = magnitude < 0x38800000u;
  const FloatLanes units =
      size * 0x1p24f + (__builtin_convertvector(whole, FloatLanes) + 0.5f) * 0x1p-13f;
  const IntLanes subnormal = __builtin_convertvector(small ? units : FloatLanes{}, IntLanes);
  BitLanes fine;
  copy_lanes(subnormal, fine);
  half = sign | (magnitude > 0x7F800000u ? infinite | 0x0200u : small ? fine : normal);
}

// Rounded stochastically: elements c, c + 1, ... of a unit.
template <typename S>
TIGER_EXT_INLINE void store_lanes_rounded(const float* in, S* out, const RandomUnit& random,
                                          int64_t c) {
  uint32_t draws[kLanes], lanes[kLanes];
  random_lanes(random, c, draws);
  for (int l = 0; l < kLanes; l += kWidth) {
    BitLanes bits, half;
    FloatLanes x;
    memcpy(&bits, draws + l, sizeof bits);
    memcpy(&x, in + l, sizeof x);
    round_lanes(x, bits, half, out);
    memcpy(lanes + l, &half, sizeof half);
  }
  store_low_lanes(lanes, &out->bits);
}

// Likewise to int8: see `quantised`.
TIGER_EXT_INLINE void store_lanes_quantised(const float* in, int8_t* out, float inverse,
                                            const RandomUnit& random, int64_t c) {
  uint32_t draws[kLanes];
  random_lanes(random, c, draws);
#if defined(TIGER_EXT_AVX512)
  const __m512 draw = _mm512_cvtepi32_ps(_mm512_loadu_si512(draws));
  const __m512 added =
      _mm512_mul_ps(_mm512_add_ps(draw, _mm512_set1_ps(0.5f)), _mm512_set1_ps(0x1p-16f));
  const __m512 y =
      _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(in), _mm512_set1_ps(inverse)), added);
  const __m512i below = _mm512_cvt_roundps_epi32(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm512_cvtsepi32_epi8(_mm512_max_epi32(below, _mm512_set1_epi32(-127))));
#else
  int32_t q[kLanes];
  for (int l = 0; l < kLanes; l += kWidth) {
    FloatLanes x;
    IntLanes draw;
    memcpy(&draw, draws + l, sizeof draw);
    memcpy(&x, in + l, sizeof x);
    const FloatLanes y =
        x * inverse + (__builtin_convertvector(draw, FloatLanes) + 0.5f) * 0x1p-16f;
    const IntLanes whole = __builtin_convertvector(y, IntLanes);
    const IntLanes below = whole + (__builtin_convertvector(whole, FloatLanes) > y);
    const IntLanes most = whole - whole + 127;
    const IntLanes bounded = below > most ? most : below < -most ? -most : below;
    memcpy(q + l, &bounded, sizeof bounded);
  }
  store_low_lanes(q, out);
#endif
}

// n < kLanes elements.
template <typename T, typename S>
TIGER_EXT_INLINE void load_some(const S* in, int64_t n, T* out) {
  std::remove_const_t<S> all[kLanes] = {};
  memcpy(all, in, static_cast<size_t>(n) * sizeof(S));
  load_lanes(all, out);
}
template <typename T, typename S>
TIGER_EXT_INLINE void store_some(const T* in, int64_t n, S* out) {
  S all[kLanes];
  store_lanes(in, all);
  memcpy(out, all, static_cast<size_t>(n) * sizeof(S));
}
