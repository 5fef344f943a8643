// SPDX-License-Identifier: Apache-2.0
//
// The emulator itself: right kernels give right results in any order, wrong ones are found out.
#include <cuda_runtime.h>
#include <cub/device/device_radix_sort.cuh>

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../cpp/check.h"

extern "C" void cuda_on_cpu_seed(uint64_t seed);
extern "C" uint64_t cuda_on_cpu_launches();
extern "C" void cuda_on_cpu_sequential(int on);

namespace tiger_ext {

constexpr unsigned kAll = ~0u;

template <typename T>
__device__ __forceinline__ T* shared() {
  extern __shared__ unsigned char tiger_ext_shared_memory[];
  return reinterpret_cast<T*>(tiger_ext_shared_memory);
}

template <typename... Expected, typename... Actual>
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Expected...),
                Actual... actual) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, actual...);
}

template <typename F>
double nanoseconds(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

// --- Kernels without mistakes --------------------------------------------------------------------

__global__ void __launch_bounds__(256) reduce(const int64_t* values, int64_t* sums) {
  int64_t sum = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int d = warpSize / 2; d > 0; d /= 2) sum += __shfl_down_sync(kAll, sum, d);
  int64_t* partial = shared<int64_t>();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

__global__ void compact(const int* values, int* kept, unsigned* count) {
  const int value = values[blockIdx.x * blockDim.x + threadIdx.x];
  const unsigned lane = threadIdx.x % 32, ballot = __ballot_sync(kAll, value % 3 == 0);
  unsigned begin = 0;
  if (lane == 0) begin = atomicAdd(count, __popc(ballot));
  begin = __shfl_sync(kAll, begin, 0);
  if (value % 3 == 0) kept[begin + __popc(ballot & ((1u << lane) - 1))] = value;
}

// Each half of the warp, and then each lane alone, goes its own way.
__global__ void parts(unsigned* out) {
  const unsigned lane = threadIdx.x;
  unsigned x = lane;
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) x += __shfl_xor_sync(0x0000ffffu, x, 1);
    out[32 + lane] = __any_sync(0x0000ffffu, lane == 3);
  } else {
    x = __shfl_sync(0xffff0000u, x, 16) + __popc(__ballot_sync(0xffff0000u, lane & 1));
    out[32 + lane] = __all_sync(0xffff0000u, lane >= 16);
  }
  __syncwarp(1u << lane);
  __syncwarp();
  out[lane] = x;
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_up_sync(kAll, lane, 1, 8);
  out[32 + lane] = __shfl_down_sync(kAll, lane, 3, 16);
  out[64 + lane] = __shfl_sync(kAll, lane, 5, 4);
  out[96 + lane] = static_cast<int>(__shfl_xor_sync(kAll, double(lane), 9, 8));
}

__global__ void votes(int* out) {
  const int x = threadIdx.x;
  const int any = __syncthreads_or(x == 50), none = __syncthreads_or(x < 0);
  const int all = __syncthreads_and(x >= 0), some = __syncthreads_and(x > 0);
  const int count = __syncthreads_count(x % 4 == 0);
  if (x == 63) *out = any + 10 * none + 100 * all + 1000 * some + 10000 * count;
}

__global__ void touch_all(int* out) { ++out[blockIdx.x * blockDim.x + threadIdx.x]; }

__global__ void index_all(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}

__global__ void four_barriers(int* out) {
  for (int i = 0; i < 4; ++i) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

__global__ void many_shuffles(int* out) {
  int x = threadIdx.x;
  for (int i = 0; i < 100; ++i) x = __shfl_xor_sync(kAll, x, 1);
  out[threadIdx.x] = x;
}

__global__ void note_order(unsigned* order, unsigned* count) {
  order[atomicAdd(count, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void copy_shared(uint64_t* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = shared<uint64_t>()[7];
}

template <size_t kBytes>
struct Parameter {
  unsigned char bytes[kBytes];
};
template <size_t kBytes>
__global__ void take(const Parameter<kBytes> __grid_constant__ parameter, int* out) {
  *out = parameter.bytes[kBytes - 1];
}

__global__ void bits_and_atomics(int* failed, unsigned long long* x) {
  bool good = __ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41 && __clz(0) == 32 &&
              __clz(1) == 31 && __clzll(1) == 63 && __popc(255) == 8 && __popcll(~0ull) == 64 &&
              __float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f;
  good = good && atomicMax(x, 7) == 5 && atomicMin(x, 6) == 7 && atomicOr(x, 9) == 6 &&
         atomicCAS(x, 15, 1) == 15 && atomicCAS(x, 15, 2) == 1 && atomicExch(x, 3) == 1 && *x == 3;
  float4 v = make_float4(1, 2, 3, 4);
  __stcs(&v, make_float4(5, 6, 7, 8));
  *failed = !good || __ldg(&v).w != 8 || alignof(float4) != 16 || alignof(ushort4) != 8;
}

void check_right_kernels() {
  constexpr int kBlocks = 20, kThreads = 256, kCount = kBlocks * kThreads;
  std::vector<int64_t> values(kCount), sums(kBlocks);
  std::vector<int> ints(kCount), kept(kCount);
  for (int i = 0; i < kCount; ++i) values[i] = int64_t{i} * i, ints[i] = i;
  for (int seed = 0; seed < 20; ++seed) {
    cuda_on_cpu_seed(seed);
    CHECK(!run(kBlocks, kThreads, 64, reduce, values.data(), sums.data()));
    for (int b = 0; b < kBlocks; ++b) {
      int64_t sum = 0;
      for (int i = 0; i < kThreads; ++i) sum += values[b * kThreads + i];
      CHECK(sums[b] == sum);
    }

    unsigned count = 0;
    CHECK(!run(kBlocks, kThreads, 0, compact, ints.data(), kept.data(), &count));
    std::set<int> distinct(kept.begin(), kept.begin() + count);
    CHECK(count == (kCount + 2) / 3 && distinct.size() == count && *distinct.rbegin() % 3 == 0);

    unsigned out[64];
    CHECK(!run(1, 32, 0, parts, out));
    for (unsigned i = 0; i < 16; ++i) CHECK(out[i] == 4 * (i + (i ^ 1)) && out[32 + i] == 1);
    for (unsigned i = 16; i < 32; ++i) CHECK(out[i] == 16 + 8 && out[32 + i] == 1);

    int moved[128], vote = 0;
    CHECK(!run(1, 32, 0, shuffles, moved));
    for (int i = 0; i < 32; ++i) {
      CHECK(moved[i] == (i % 8 ? i - 1 : i));
      CHECK(moved[32 + i] == (i % 16 + 3 < 16 ? i + 3 : i));
      CHECK(moved[64 + i] == i / 4 * 4 + 1);
      CHECK(moved[96 + i] == ((i ^ 9) <= (i | 7) ? i ^ 9 : i));
    }
    CHECK(!run(1, 64, 0, votes, &vote) && vote == 160101);
  }

  std::vector<unsigned> visits(2 * 3 * 4 * 5 * 6 * 7);
  CHECK(!run({2, 3, 4}, {5, 6, 7}, 0, index_all, visits.data()));
  for (const unsigned v : visits) CHECK(v == 1);

  unsigned long long x = 5;
  int failed = 1;
  CHECK(!run(1, 1, 0, bits_and_atomics, &failed, &x) && !failed);

  // Launches from several host threads take turns.
  std::vector<int> out(4 * kThreads);
  std::vector<std::thread> hosts;
  for (int h = 0; h < 4; ++h)
    hosts.emplace_back([&, h] {
      for (int i = 0; i < 50; ++i) run(1, kThreads, 0, four_barriers, &out[h * kThreads]);
    });
  for (std::thread& host : hosts) host.join();
  for (const int v : out) CHECK(v == 1);
}

// --- Chance --------------------------------------------------------------------------------------

std::vector<unsigned> order_of(uint64_t seed, int grid, int block) {
  std::vector<unsigned> order(grid * block);
  unsigned count = 0;
  cuda_on_cpu_seed(seed);
  run(grid, block, 0, note_order, order.data(), &count);
  return order;
}

void check_chance() {
  CHECK(order_of(1, 50, 1) == order_of(1, 50, 1) && order_of(1, 50, 1) != order_of(2, 50, 1));
  CHECK(order_of(1, 1, 96) == order_of(1, 1, 96) && order_of(1, 1, 96) != order_of(2, 1, 96));
  std::set<unsigned> first_blocks, first_threads;
  for (int seed = 0; seed < 200; ++seed) {
    first_blocks.insert(order_of(seed, 8, 1)[0]);
    first_threads.insert(order_of(seed, 1, 64)[0]);
  }
  CHECK(first_blocks.size() == 8 && first_threads.size() > 50);

  cuda_on_cpu_sequential(1);
  const std::vector<unsigned> order = order_of(1, 10, 100);
  for (unsigned i = 0; i < order.size(); ++i) CHECK(order[i] == i);
  cuda_on_cpu_sequential(0);

  std::vector<uint64_t> garbage(100);
  run(100, 32, 64, copy_shared, garbage.data());
  CHECK(std::set<uint64_t>(garbage.begin(), garbage.end()).size() == 100);
}

// Kernels whose result depends on the order: a barrier is missing at the place `without`.
__global__ void rotate(unsigned* out, int without) {
  unsigned* x = shared<unsigned>();
  x[threadIdx.x] = threadIdx.x;
  if (without != 0) __syncthreads();
  const unsigned next = x[(threadIdx.x + 1) % blockDim.x];
  if (without != 1) __syncthreads();
  x[threadIdx.x] = 2 * next;
  if (without != 2) __syncwarp();
  out[threadIdx.x] = x[threadIdx.x ^ 1];
}

bool rotates(int without) {
  unsigned out[128];
  run(1, 128, sizeof(out), rotate, out, without);
  for (unsigned i = 0; i < 128; ++i)
    if (out[i] != 2 * (((i ^ 1) + 1) % 128)) return false;
  return true;
}

void check_missing_barriers() {
  int wrong[4] = {};
  for (int seed = 0; seed < 20; ++seed)
    for (int without = 0; without < 4; ++without) {
      cuda_on_cpu_seed(seed);
      wrong[without] += !rotates(without);
    }
  CHECK(wrong[0] > 0 && wrong[1] > 0 && wrong[2] > 0 && wrong[3] == 0);
  std::printf("missing barriers found by %d, %d and %d of 20 seeds\n", wrong[0], wrong[1],
              wrong[2]);
}

// --- Runtime API and radix sort
// --------------------------------------------------------------------

void check_errors() {
  int out[1024] = {}, *p = out;
  const auto fails = [&](cudaError_t expected, dim3 grid, dim3 block, size_t shared_bytes) {
    CHECK(run(grid, block, shared_bytes, touch_all, p) == expected);
    CHECK(cudaPeekAtLastError() == expected && cudaGetLastError() == expected);
    CHECK(cudaGetLastError() == cudaSuccess);
  };
  const uint64_t launches = cuda_on_cpu_launches();
  fails(cudaErrorInvalidConfiguration, 0, 32, 0);
  fails(cudaErrorInvalidConfiguration, 1, 0, 0);
  fails(cudaErrorInvalidConfiguration, 1, 1025, 0);
  fails(cudaErrorInvalidConfiguration, 1, {64, 32}, 0);
  fails(cudaErrorInvalidConfiguration, 1u << 31, 1, 0);
  fails(cudaErrorInvalidConfiguration, {1, 65536}, 1, 0);
  fails(cudaErrorInvalidConfiguration, 1, 1, 48 * 1024 + 1);
  CHECK(cuda_on_cpu_launches() == launches);
  fails(cudaSuccess, 1, 1024, 48 * 1024);
  CHECK(cuda_on_cpu_launches() == launches + 1);

  Parameter<32764 - sizeof(int*)> fits{};
  Parameter<32764 - sizeof(int*) + 1> large{};
  fits.bytes[sizeof(fits) - 1] = 5;
  CHECK(run(1, 1, 0, take<sizeof(fits)>, fits, p) == cudaSuccess && *p == 5);
  CHECK(run(1, 1, 0, take<sizeof(large)>, large, p) == cudaErrorInvalidValue);
  CHECK(std::string(cudaGetErrorName(cudaGetLastError())) == "cudaErrorInvalidValue");

  int *host, *device, number = -1;
  CHECK(!cudaHostAlloc(&host, 40, cudaHostAllocPortable | cudaHostAllocMapped));
  CHECK(!cudaHostGetDevicePointer(&device, host, 0));
  CHECK(!cudaMemsetAsync(device, 0, 40) && !cudaGetDevice(&number) && number == 0);
  CHECK(!run(1, 10, 0, touch_all, device) && host[9] == 1);
  CHECK(!cudaMemcpyAsync(out, device, 40, cudaMemcpyDeviceToHost) && out[9] == 1);
  CHECK(!cudaFreeHost(host));
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  CHECK(!cudaThreadExchangeStreamCaptureMode(&mode) && mode == cudaStreamCaptureModeGlobal);
  CHECK(!cudaThreadExchangeStreamCaptureMode(&mode) && mode == cudaStreamCaptureModeRelaxed);
}

template <typename Key>
void check_radix_sort() {
  constexpr int kBits = sizeof(Key) * 8;
  uint64_t state = 0;
  std::set<int> selectors;
  for (const size_t n : {size_t{0}, size_t{1}, size_t{1000}})
    for (int begin = 0; begin <= kBits; begin += 4)
      for (int end = begin; end <= kBits; end += 4) {
        std::vector<Key> expected(n), other(n);
        for (Key& key : expected)
          key = static_cast<Key>((state = state * 0x5851f42d4c957f2d + 1) >> 7);
        std::vector<Key> keys = expected;
        const Key mask = end - begin == kBits ? ~Key{0} : (Key{1} << (end - begin)) - 1;
        std::stable_sort(expected.begin(), expected.end(), [&](Key a, Key b) {
          return begin < kBits && (a >> begin & mask) < (b >> begin & mask);
        });

        cub::DoubleBuffer<Key> buffers(keys.data(), other.data());
        size_t bytes = 0;
        CHECK(!cub::DeviceRadixSort::SortKeys(nullptr, bytes, buffers, n, begin, end) && bytes > 0);
        std::vector<unsigned char> temp(bytes);
        const uint64_t launches = cuda_on_cpu_launches();
        CHECK(!cub::DeviceRadixSort::SortKeys(temp.data(), bytes, buffers, n, begin, end));
        CHECK(cuda_on_cpu_launches() == launches + 1);
        CHECK(std::equal(expected.begin(), expected.end(), buffers.Current()));
        CHECK(n < 2 || !std::equal(expected.begin(), expected.end(), buffers.Alternate()));
        CHECK(!n || std::set<int>(temp.begin(), temp.end()).size() > 1);
        selectors.insert(buffers.selector);
        --bytes;
        CHECK(cub::DeviceRadixSort::SortKeys(temp.data(), bytes, buffers, n, begin, end));
      }
  CHECK(selectors.size() == 2);
}

// --- Misuse --------------------------------------------------------------------------------------

__global__ void divergent_barriers(int*) {
  if (threadIdx.x < 40) __syncthreads();
  else __syncthreads();
}
__global__ void barrier_of_a_part(int*) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void barrier_after_exit(int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x == 5) __syncthreads();
  else *out = __shfl_sync(kAll, 1, 0);
}
__global__ void other_kind_of_barrier(int* out) {
  threadIdx.x == 5 ? * out = __syncthreads_or(1) : * out = __syncthreads_and(1);
}
__global__ void lane_missing(int* out) {
  if (threadIdx.x % 32 != 9) *out = __shfl_down_sync(kAll, 1, 1);
}
__global__ void lane_without_thread(int*) { __syncwarp(); }
__global__ void mask_without_self(int* out) { *out = __any_sync(kAll << 1, 1); }
__global__ void different_masks(int*) { __syncwarp(threadIdx.x < 4 ? 0xffu : 0xfeu); }
__global__ void different_kinds(int* out) {
  *out = threadIdx.x == 3 ? __any_sync(kAll, 1) : __all_sync(kAll, 1);
}
__global__ void circle(int*) {  // each pair waits for a lane that waits for another pair
  if (threadIdx.x < 3) __syncwarp(1u << threadIdx.x | 1u << (threadIdx.x + 1) % 3);
}
__global__ void bad_width(int* out) { *out = __shfl_sync(kAll, 1, 0, 12); }
#ifdef __SANITIZE_ADDRESS__
__global__ void past_shared_memory(int* out) { *out = shared<int>()[16]; }
#endif

void check_aborts(void (*kernel)(int*), int threads, const std::string& message) {
  for (int seed = 0; seed < 5; ++seed) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    const pid_t child = fork();
    if (child == 0) {
      dup2(ends[1], STDERR_FILENO);
      cuda_on_cpu_seed(seed);
      int out;
      run(2, threads, 64, kernel, &out);
      _exit(0);
    }
    close(ends[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, n);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    const bool aborted = !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(aborted && text.find(message) != std::string::npos);
    if (seed == 0) std::printf("%s\n", text.substr(0, text.find('\n', 100)).c_str());
  }
}

void check_misuse() {
  check_aborts(divergent_barriers, 64, "reached while others wait at another barrier");
  check_aborts(barrier_of_a_part, 64, "exited");
  check_aborts(barrier_after_exit, 64, "exited");
  check_aborts(barrier_against_shuffle, 32, "deadlock");
  check_aborts(other_kind_of_barrier, 64, "reached while others wait at another barrier");
  check_aborts(lane_missing, 64, "exited");
  check_aborts(lane_without_thread, 40, "do not exist: ffffff00");
  check_aborts(mask_without_self, 32, "which does not name the calling lane 0");
  check_aborts(different_masks, 8, " meets lanes ");
  check_aborts(different_kinds, 32, " meets lanes ");
  check_aborts(circle, 32, "deadlock");
  check_aborts(bad_width, 32, "width 12");
#ifdef __SANITIZE_ADDRESS__
  check_aborts(past_shared_memory, 32, "AddressSanitizer: use-after-poison");
#endif
}

// --- Speed
// -----------------------------------------------------------------------------------------

void measure() {
  constexpr int kThreads = 256, kBlocks = 4000;
  std::vector<int> out(kThreads * kBlocks);
  const double plain = nanoseconds([&] { run(kBlocks, kThreads, 0, touch_all, out.data()); });
  std::printf("no barriers: %.1f ns a thread\n", plain / out.size());
  CHECK(plain < 2e9);
  for (const int v : out) CHECK(v == 1);

  const double barriers =
      nanoseconds([&] { run(kBlocks / 4, kThreads, 0, four_barriers, out.data()); });
  std::printf("256 threads, 4 barriers: %.1f us a block, %.1f ns a switch\n",
              barriers / (kBlocks / 4) / 1000, barriers / (kBlocks / 4) / (kThreads * 5));
  const double shuffled = nanoseconds([&] { run(kBlocks / 4, 32, 0, many_shuffles, out.data()); });
  std::printf("shuffle: %.1f ns a lane\n", shuffled / (kBlocks / 4) / (100 * 32));
  const double empty = nanoseconds([&] {
    for (int i = 0; i < 10000; ++i) run(1, 32, 0, touch_all, out.data());
  });
  std::printf("launch of one warp: %.0f ns\n", empty / 10000);
}

}  // namespace tiger_ext

int main() {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // forked children must not print it again
  using namespace tiger_ext;
  check_right_kernels();
  check_chance();
  check_missing_barriers();
  check_errors();
  check_radix_sort<uint32_t>();
  check_radix_sort<uint64_t>();
  check_misuse();
  measure();
  std::printf(failures ? "%d failures\n" : "all good\n", failures);
  return failures != 0;
}
