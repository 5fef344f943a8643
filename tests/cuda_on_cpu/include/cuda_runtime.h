// SPDX-License-Identifier: Apache-2.0
//
// Stands in for the CUDA toolkit's header when the kernels are compiled by the host compiler and
// run on the CPU (see emulator.cpp). Only what the kernels need, and deliberately no more:
//
//   - Threads run one at a time until they wait for others. A thread that spins until another
//     thread or block has done something hangs.
//   - Shared memory is only the dynamic one, declared at block scope in a function that stands
//     directly in namespace tiger_ext: `extern __shared__ unsigned char tiger_ext_shared_memory[];`
//     A static `__shared__` array would silently become a private one of each thread.
//   - No __activemask (its value is up to the compiler) and no atomics on floats (not
//   reproducible).
//   - A shuffle from a lane outside the mask gives garbage.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <concepts>
#include <mutex>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#define CUDART_VERSION 13000
#define __CUDA_ARCH_LIST__ 900

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// `const T __grid_constant__ x` becomes a reference, so that threads do not copy the parameter.
#define __grid_constant__ &

// --- Vector types ------------------------------------------------------------------------------

#define CUDA_ON_CPU_VECTORS(name, T)                                             \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                             \
  struct name##3 { T x, y, z; };                                                 \
  struct alignas(std::min<size_t>(16, 4 * sizeof(T))) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                     \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }             \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(uchar, unsigned char)
CUDA_ON_CPU_VECTORS(short, short)
CUDA_ON_CPU_VECTORS(ushort, unsigned short)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(uint, unsigned)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)
CUDA_ON_CPU_VECTORS(longlong, long long)
CUDA_ON_CPU_VECTORS(ulonglong, unsigned long long)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// --- Runtime API -------------------------------------------------------------------------------
// There is one device, its memory is the host's, and everything is done when the call returns.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotReady = 600
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags);

template <typename T>
cudaError_t cudaHostAlloc(T** pointer, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(pointer), bytes, flags);
}
template <typename T>
cudaError_t cudaHostGetDevicePointer(T** device, void* host, unsigned /*flags*/) {
  *device = static_cast<T*>(host);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// --- The emulator's own interface --------------------------------------------------------------

namespace cuda_on_cpu {

using Where = std::source_location;

enum class Op : uint8_t {
  kNone,
  kSyncthreads,
  kSyncthreadsOr,
  kSyncthreadsAnd,
  kSyncthreadsCount,
  kSyncwarp,
  kShfl,
  kShflUp,
  kShflDown,
  kShflXor,
  kBallot,
  kAny,
  kAll
};

// Each waits until all threads concerned have called it.
int block_barrier(Op op, bool predicate, Where where);
unsigned warp_vote(Op op, unsigned mask, bool predicate, Where where);
uint64_t warp_shuffle(Op op, unsigned mask, uint64_t value, int operand, int width, Where where);

using Body = void (*)(const void* call);  // runs the current thread
cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes, Body body,
                   const void* call);

// Counts as a launch, and keeps other host threads from launching while it is held.
[[nodiscard]] std::unique_lock<std::mutex> start_launch();

// For the holder of the above.
uint64_t random();
void scribble(void* to, size_t bytes);  // leaves garbage

template <typename T>
T shuffle(Op op, unsigned mask, T value, int operand, int width, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_shuffle(op, mask, bits, operand, width, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
  static_assert(sizeof...(Expected) == sizeof...(Actual));
  static_assert((std::is_trivially_copyable_v<std::decay_t<Expected>> && ...));
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<std::decay_t<Expected>...> arguments;
  } call{kernel, std::tuple<std::decay_t<Expected>...>(std::forward<Actual>(actual)...)};
  const auto body = [](const void* p) {
    std::apply(static_cast<const Call*>(p)->kernel, static_cast<const Call*>(p)->arguments);
  };
  return cuda_on_cpu::launch(*config, (size_t{0} + ... + sizeof(Expected)), body, &call);
}

// --- In kernels --------------------------------------------------------------------------------

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
extern const int warpSize;  // as in CUDA, not a constant expression

namespace cuda_on_cpu::device {

inline void __syncthreads(Where where = Where::current()) {
  block_barrier(Op::kSyncthreads, false, where);
}
inline int __syncthreads_or(int predicate, Where where = Where::current()) {
  return block_barrier(Op::kSyncthreadsOr, predicate != 0, where);
}
inline int __syncthreads_and(int predicate, Where where = Where::current()) {
  return block_barrier(Op::kSyncthreadsAnd, predicate != 0, where);
}
inline int __syncthreads_count(int predicate, Where where = Where::current()) {
  return block_barrier(Op::kSyncthreadsCount, predicate != 0, where);
}
inline void __syncwarp(unsigned mask = ~0u, Where where = Where::current()) {
  warp_vote(Op::kSyncwarp, mask, false, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return warp_vote(Op::kBallot, mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return warp_vote(Op::kAny, mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return warp_vote(Op::kAll, mask, predicate != 0, where) != 0;
}
template <typename T>
T __shfl_sync(unsigned mask, T x, int lane, int width = 32, Where where = Where::current()) {
  return shuffle(Op::kShfl, mask, x, lane, width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned d, int width = 32, Where where = Where::current()) {
  return shuffle(Op::kShflUp, mask, x, d, width, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned d, int width = 32, Where where = Where::current()) {
  return shuffle(Op::kShflDown, mask, x, d, width, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, Where where = Where::current()) {
  return shuffle(Op::kShflXor, mask, x, lanes, width, where);
}

// Only one thread runs at a time, so that fences and atomics are trivial. The type of an operand
// follows the address, as with CUDA's overloads.
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }
// The host does run beside it.
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
concept Atomic =
    std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;
template <typename Pointer>
using Value = std::remove_pointer_t<Pointer>;

auto atomicExch(Atomic auto* p, Value<decltype(p)> x) { return std::exchange(*p, x); }
auto atomicMin(Atomic auto* p, Value<decltype(p)> x) { return std::exchange(*p, std::min(*p, x)); }
auto atomicMax(Atomic auto* p, Value<decltype(p)> x) { return std::exchange(*p, std::max(*p, x)); }
auto atomicOr(Atomic auto* p, Value<decltype(p)> x) { return std::exchange(*p, *p | x); }
auto atomicCAS(Atomic auto* p, Value<decltype(p)> compare, Value<decltype(p)> x) {
  return std::exchange(*p, *p == compare ? x : *p);
}
auto atomicAdd(Atomic auto* p, Value<decltype(p)> x) {
  using Unsigned = std::make_unsigned_t<Value<decltype(p)>>;  // wraps around
  return std::exchange(*p, static_cast<Unsigned>(*p) + static_cast<Unsigned>(x));
}

// Accesses with a cache hint.
auto __ldg(const auto* p) { return *p; }
auto __ldcs(const auto* p) { return *p; }
auto __ldcg(const auto* p) { return *p; }
void __stcs(auto* p, Value<decltype(p)> x) { *p = x; }
void __stcg(auto* p, Value<decltype(p)> x) { *p = x; }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

}  // namespace cuda_on_cpu::device

using namespace cuda_on_cpu::device;
