// SPDX-License-Identifier: Apache-2.0
//
// Part of kernels.inl: elements in the arithmetic type, from and to any storage type, and the rule
// over one block of them.

template <typename T, typename S>
void load_as(const void* data, int64_t offset, const int64_t* index, int64_t n, T* __restrict out) {
  const S* __restrict source = static_cast<const S*>(data) + offset;
  if (index) {
    for (int64_t i = 0; i < n; ++i) out[i] = load_element<T>(source[index[i]]);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) load_lanes(source + i, out + i);
    for (; i < n; ++i) out[i] = load_element<T>(source[i]);
  }
}

template <typename T, typename S>
void store_as(void* data, int64_t offset, const int64_t* index, int64_t n, const T* __restrict in) {
  S* __restrict target = static_cast<S*>(data) + offset;
  if (index) {
    for (int64_t i = 0; i < n; ++i) store_element<T>(target + index[i], in[i]);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_lanes(in + i, target + i);
    for (; i < n; ++i) store_element<T>(target + i, in[i]);
  }
}

// What works on a whole block is not inlined: there are many callers.

// n elements from `offset` (then through `index`, if given) as T, into out.
template <typename T>
__attribute__((noinline)) void load(const Stream& s, int64_t offset, const int64_t* index,
                                    int64_t n, T* out) {
  switch (s.storage) {
    case Storage::kFloat32:
      return load_as<T, float>(s.data, offset, index, n, out);
    case Storage::kFloat64:
      return load_as<T, double>(s.data, offset, index, n, out);
    case Storage::kBFloat16:
      return load_as<T, BFloat16>(s.data, offset, index, n, out);
    case Storage::kFloat16:
      return load_as<T, Float16>(s.data, offset, index, n, out);
    case Storage::kInt8:
      return load_as<T, int8_t>(s.data, offset, index, n, out);
  }
}

template <typename T>
__attribute__((noinline)) void store(const Stream& s, int64_t offset, const int64_t* index,
                                     int64_t n, const T* in) {
  switch (s.storage) {
    case Storage::kFloat32:
      return store_as<T, float>(s.data, offset, index, n, in);
    case Storage::kFloat64:
      return store_as<T, double>(s.data, offset, index, n, in);
    case Storage::kBFloat16:
      return store_as<T, BFloat16>(s.data, offset, index, n, in);
    case Storage::kFloat16:
      return store_as<T, Float16>(s.data, offset, index, n, in);
    case Storage::kInt8:
      return;  // see `quantise`
  }
}

template <typename T, typename S>
void store_rounded_as(void* data, int64_t offset, const int64_t* index, int64_t n, const T* in,
                      const RandomUnit& given, int64_t first) {
  const RandomUnit random = given;
  S* __restrict target = static_cast<S*>(data) + offset;
  for (int64_t i = 0; i < n; ++i)
    target[index ? index[i] : i] =
        rounded_to<S>(static_cast<float>(in[i]), random(static_cast<uint32_t>(first + i)));
}

// Elements `first`, first + 1, ... of the unit `random`, of a parameter in half precision.
template <typename T>
__attribute__((noinline)) void store_rounded(const Stream& s, int64_t offset, const int64_t* index,
                                             int64_t n, const T* in, const RandomUnit& random,
                                             int64_t first) {
  if (s.storage == Storage::kBFloat16)
    store_rounded_as<T, BFloat16>(s.data, offset, index, n, in, random, first);
  else store_rounded_as<T, Float16>(s.data, offset, index, n, in, random, first);
}

// The bits of the largest magnitude, in float32, of which those of Inf and NaN are larger.
template <typename T>
TIGER_EXT_INLINE uint32_t largest_bits(const T* __restrict x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(static_cast<float>(x[i])) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Elements `first`, first + 1, ... of the unit `random`, whose scale is given.
template <typename T>
TIGER_EXT_INLINE void quantise(const Stream& s, int64_t offset, const int64_t* index, int64_t n,
                               const T* in, float scale, const RandomUnit& random, int64_t first) {
  const RandomUnit own = random;
  int8_t* __restrict target = static_cast<int8_t*>(s.data) + offset;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;  // 0: nothing, or not finite
  int64_t i = 0;
  if (inverse == 0.0f) {
    for (; i < n; ++i) target[index ? index[i] : i] = 0;
  } else if constexpr (sizeof(T) == 4) {
    if (!index)
      for (; i + kLanes <= n; i += kLanes)
        store_lanes_quantised(in + i, target + i, inverse, own, first + i);
  }
  for (; i < n; ++i)
    target[index ? index[i] : i] = static_cast<int8_t>(
        quantised(static_cast<float>(in[i]), inverse, own(static_cast<uint32_t>(first + i))));
}

// Elements of a momentum in int8.
template <typename T>
__attribute__((noinline)) void load_scaled(const Stream& s, int64_t offset, const int64_t* index,
                                           int64_t n, float scale, T* out) {
  load(s, offset, index, n, out);
  for (int64_t i = 0; i < n; ++i) out[i] *= static_cast<T>(scale);
}

template <typename T, typename Rule>
TIGER_EXT_INLINE void apply(const Rule& given, const T* __restrict grad, T* __restrict param,
                            T* const* states, int64_t n) {
  const Rule rule = given;  // which no store can change
  if constexpr (Rule::kStates == 0) {
    for (int64_t i = 0; i < n; ++i) rule(grad[i], param[i]);
  } else {
    T* __restrict s0 = states[0];
    if constexpr (Rule::kDirected) {
      // The direction is chosen outside the loop.
      rule.with_direction([&]<Direction kDirection>() {
        if (rule.moves)
          for (int64_t i = 0; i < n; ++i)
            rule.template update<kDirection, true>(grad[i], param[i], s0[i]);
        else
          for (int64_t i = 0; i < n; ++i)
            rule.template update<kDirection, false>(grad[i], param[i], s0[i]);
      });
    } else if constexpr (Rule::kStates == 1) {
      for (int64_t i = 0; i < n; ++i) rule(grad[i], param[i], s0[i]);
    } else {
      T* __restrict s1 = states[1];
      for (int64_t i = 0; i < n; ++i) rule(grad[i], param[i], s0[i], s1[i]);
    }
  }
}

template <typename T>
bool is_native(const Stream& s) {
  return s.storage == native_storage<T>();
}

template <typename T, typename Item>
bool updates_in_place(const Item& item, int states) {
  bool native = is_native<T>(item.param);
  for (int k = 0; k < states; ++k) native = native && is_native<T>(item.states[k]);
  return native;
}

// Where a block lies in each tensor: offsets, then through an index where there is one.
struct BlockPlace {
  int64_t param = 0;
  const int64_t* param_index = nullptr;
  int64_t states[kMaxStates] = {};
  const int64_t* state_indices[kMaxStates] = {};
};

// A block of at most kBlock elements in the L1 cache, in the arithmetic type.
template <typename T, int kStates>
class Block {
 public:
  Block(const Stream& param, const Stream* states, const BlockPlace& at, int64_t n)
      : param_(param), states_(states), at_(at), n_(n) {}

  // `scale`: of the first state if it is in int8.
  template <typename Rule>
  __attribute__((noinline)) void update(const Rule& rule, const T* grad, float scale = 0.0f) {
    T* pointers[kMaxStates] = {s_[0], s_[1]};
    if (moves_param(rule)) load(param_, at_.param, at_.param_index, n_, p_);
    for (int k = 0; k < kStates; ++k) {
      const int64_t offset = at_.states[k];
      if (states_[k].storage == Storage::kInt8)
        load_scaled(states_[k], offset, at_.state_indices[k], n_, scale, s_[k]);
      else load(states_[k], offset, at_.state_indices[k], n_, s_[k]);
    }
    apply(rule, grad, p_, pointers, n_);
  }

  TIGER_EXT_INLINE void store_param() const { store(param_, at_.param, at_.param_index, n_, p_); }
  TIGER_EXT_INLINE void store_param(const RandomUnit& random, int64_t first) const {
    store_rounded(param_, at_.param, at_.param_index, n_, p_, random, first);
  }
  // But for those in int8.
  TIGER_EXT_INLINE void store_states() const {
    for (int k = 0; k < kStates; ++k)
      store(states_[k], at_.states[k], at_.state_indices[k], n_, s_[k]);
  }
  const T* momentum() const { return s_[0]; }

 private:
  const Stream& param_;
  const Stream* const states_;
  const BlockPlace& at_;
  const int64_t n_;
  alignas(kCacheLine) T p_[kBlock];
  alignas(kCacheLine) T s_[kMaxStates][kBlock];
};

template <typename T, typename Rule>
__attribute__((noinline)) void apply_converted(const Rule& rule, const T* grad, const Stream& param,
                                               const Stream* states, const BlockPlace& at,
                                               int64_t n) {
  Block<T, Rule::kStates> block(param, states, at, n);
  block.update(rule, grad);
  if (moves_param(rule)) block.store_param();
  block.store_states();
}

// A gradient that is zero everywhere.
template <typename T>
const T* zeros() {
  alignas(kCacheLine) static constexpr T block[kBlock] = {};
  return block;
}

// n <= kBlock elements as T: where they lie, or converted into `buffer`.
template <typename T>
const T* view(const Stream& s, int64_t offset, const int64_t* index, int64_t n, T* buffer) {
  if (!s.data) return zeros<T>();
  if (!index && is_native<T>(s)) return static_cast<const T*>(s.data) + offset;
  load(s, offset, index, n, buffer);
  return buffer;
}

// The momentum, which may be in int8; `unit`: the number of its scale.
template <typename T, typename Item>
const T* momentum_view(const Item& item, const Stream& s, int64_t offset, const int64_t* index,
                       int64_t unit, int64_t n, T* buffer) {
  if (!item.scales) return view(s, offset, index, n, buffer);
  load_scaled(s, offset, index, n, item.scales[unit], buffer);
  return buffer;
}
