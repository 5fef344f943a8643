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

// n elements from `offset` (then through `index`, if given) as T, into out.
template <typename T>
void load(const Stream& s, int64_t offset, const int64_t* index, int64_t n, T* out) {
  switch (s.storage) {
    case Storage::kFloat32:
      return load_as<T, float>(s.data, offset, index, n, out);
    case Storage::kFloat64:
      return load_as<T, double>(s.data, offset, index, n, out);
    case Storage::kBFloat16:
      return load_as<T, BFloat16>(s.data, offset, index, n, out);
    case Storage::kFloat16:
      return load_as<T, Float16>(s.data, offset, index, n, out);
  }
}

template <typename T>
void store(const Stream& s, int64_t offset, const int64_t* index, int64_t n, const T* in) {
  switch (s.storage) {
    case Storage::kFloat32:
      return store_as<T, float>(s.data, offset, index, n, in);
    case Storage::kFloat64:
      return store_as<T, double>(s.data, offset, index, n, in);
    case Storage::kBFloat16:
      return store_as<T, BFloat16>(s.data, offset, index, n, in);
    case Storage::kFloat16:
      return store_as<T, Float16>(s.data, offset, index, n, in);
  }
}

template <typename T, typename Rule>
TIGER_EXT_INLINE void apply(const Rule& rule, const T* __restrict grad, T* __restrict param,
                            T* const* states, int64_t n) {
  if constexpr (Rule::kStates == 0) {
    for (int64_t i = 0; i < n; ++i) rule(T(0), param[i]);
    return;
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

// One block of at most kBlock elements through the L1 cache; offsets and indices per stream.
template <typename T, typename Rule>
void apply_converted(const Rule& rule, const T* grad, const Stream& param, int64_t param_offset,
                     const int64_t* param_index, const Stream* states, const int64_t* state_offsets,
                     const int64_t* const* state_indices, int64_t n) {
  alignas(kCacheLine) T p[kBlock];
  alignas(kCacheLine) T s[kMaxStates][kBlock];
  T* pointers[kMaxStates] = {s[0], s[1]};
  if (moves_param(rule)) load(param, param_offset, param_index, n, p);
  for (int k = 0; k < Rule::kStates; ++k)
    load(states[k], state_offsets[k], state_indices[k], n, s[k]);
  apply(rule, grad, p, pointers, n);
  if (moves_param(rule)) store(param, param_offset, param_index, n, p);
  for (int k = 0; k < Rule::kStates; ++k)
    store(states[k], state_offsets[k], state_indices[k], n, s[k]);
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
