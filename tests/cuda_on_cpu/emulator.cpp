// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on the CPU, to find their mistakes rather than to be fast: blocks run one after
// another in random order, and the threads of a block one at a time, in random order too, each
// until it waits for others at a barrier or a warp collective.
//
// A waiting thread keeps its stack, so threads run on fibers. A fiber whose thread has ended goes
// on with the next; only a wait makes the machine take another fiber. A kernel without
// barriers therefore runs on a single fiber.
//
// What CUDA leaves undefined ends the process with a report: see fail().
#include <cuda_runtime.h>

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

constexpr unsigned kWarpThreads = 32, kMaxThreads = 1024, kMaxSharedBytes = 48 * 1024;
constexpr size_t kMaxParameterBytes = 32764;

namespace tiger_ext {
alignas(128) unsigned char tiger_ext_shared_memory[kMaxSharedBytes];
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
extern const int warpSize = kWarpThreads;

namespace cuda_on_cpu {
namespace {

// --- Fibers ------------------------------------------------------------------------------------

struct Fiber {
#ifdef CUDA_ON_CPU_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;  // while it does not run
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
#endif
};

Fiber launcher;  // the stack of the host thread
Fiber *running = &launcher, *previous = nullptr;
std::deque<Fiber> fibers;  // kept until the process ends
std::vector<Fiber*> idle_fibers;

[[noreturn]] void run_threads() noexcept;

#ifndef CUDA_ON_CPU_UCONTEXT
// Pushes what a function must preserve, swaps the stacks, pops what was pushed there.
extern "C" void cuda_on_cpu_swap(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.pushsection .text
.hidden cuda_on_cpu_swap
.globl cuda_on_cpu_swap
.type cuda_on_cpu_swap, @function
cuda_on_cpu_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_swap, . - cuda_on_cpu_swap
.popsection
)");
#endif

void arrived() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running->fake_stack, &previous->stack, &previous->stack_bytes);
#endif
}

// Returns when another fiber switches back.
void switch_to(Fiber* to) {
  previous = std::exchange(running, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&previous->fake_stack, to->stack, to->stack_bytes);
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
  swapcontext(&previous->context, &to->context);
#else
  cuda_on_cpu_swap(&previous->stack_pointer, to->stack_pointer);
#endif
  arrived();
}

Fiber* make_fiber() {
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t kStackBytes = 512 * 1024;
#else
  constexpr size_t kStackBytes = 128 * 1024;
#endif
  const size_t guard = sysconf(_SC_PAGESIZE), bytes = guard + kStackBytes;
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    std::perror("cuda_on_cpu: no memory for a stack");
    std::abort();
  }
  std::byte* stack = static_cast<std::byte*>(memory) + guard;
  Fiber* fiber = &fibers.emplace_back();
#ifdef __SANITIZE_ADDRESS__
  fiber->stack = stack;
  fiber->stack_bytes = kStackBytes;
#endif
  // Stacks begin at various offsets in their pages, lest all compete for the same cache lines.
  const size_t used_bytes = kStackBytes - fibers.size() % 16 * 256;
#ifdef CUDA_ON_CPU_UCONTEXT
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = used_bytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, run_threads, 0);
#else
  // As cuda_on_cpu_swap expects it: six registers, the address to return to and, for run_threads, a
  // null return address of its own.
  void** top = reinterpret_cast<void**>(stack + used_bytes);
  top[-2] = reinterpret_cast<void*>(&run_threads);
  fiber->stack_pointer = top - 8;
#endif
  return fiber;
}

Fiber* take_fiber() {
  if (idle_fibers.empty()) return make_fiber();
  Fiber* fiber = idle_fibers.back();
  idle_fibers.pop_back();
  return fiber;
}

// --- The machine -------------------------------------------------------------------------------

std::mutex mutex;
uint64_t launches = 0, random_state = 1;
bool sequential = false;

struct Thread {
  unsigned number, warp, lane;
  uint3 index;
  Fiber* fiber = nullptr;  // while it waits
  Op op = Op::kNone;       // what it waits for, with which mask, and where
  unsigned mask;
  Where where;
  uint64_t value, result;  // of a shuffle or vote
  unsigned source;         // the lane whose value a shuffle returns
};

// Lanes that have come to a collective and wait for the rest of `mask`.
struct Group {
  Op op;
  unsigned mask, arrived;
};

// Numbers below 32, to be drawn at random.
struct Urn {
  uint8_t members[32];
  unsigned count = 0;

  void add(unsigned member) { members[count++] = static_cast<uint8_t>(member); }
  unsigned draw_position() const {
    if (sequential) return std::min_element(members, members + count) - members;
    return static_cast<unsigned>((random() >> 32) * count >> 32);
  }
  unsigned remove(unsigned position) { return std::exchange(members[position], members[--count]); }
};

struct Warp {
  unsigned alive, not_started;  // bits of lanes
  Urn runnable;
  Group groups[kWarpThreads];
  unsigned group_count;
};

struct Barrier {
  Op op;
  Where where;
  unsigned arrived, trues;
  int result;
};

Body body;
const void* call;
unsigned block_threads;
Thread threads[kMaxThreads];

Warp warps[kMaxThreads / kWarpThreads];
Barrier barrier;
unsigned alive_threads;
Urn runnable_warps;
// The position in it of the warp that runs, until none of its lanes is runnable or somebody waits
// no longer.
std::optional<unsigned> running_warp;
Thread* current;

bool same(const Where& a, const Where& b) {
  const char *a_file = a.file_name(), *b_file = b.file_name();
  return a.line() == b.line() && a.column() == b.column() &&
         (a_file == b_file || std::strcmp(a_file, b_file) == 0);
}

// In the order of Op.
constexpr const char* kNames[] = {"",
                                  "__syncthreads",
                                  "__syncthreads_or",
                                  "__syncthreads_and",
                                  "__syncthreads_count",
                                  "__syncwarp",
                                  "__shfl_sync",
                                  "__shfl_up_sync",
                                  "__shfl_down_sync",
                                  "__shfl_xor_sync",
                                  "__ballot_sync",
                                  "__any_sync",
                                  "__all_sync"};

const char* name(Op op) { return kNames[static_cast<size_t>(op)]; }

__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...) {
  char text[512];
  va_list values;
  va_start(values, pattern);
  std::vsnprintf(text, sizeof(text), pattern, values);
  va_end(values);
  return text;
}

std::string describe(Op op, unsigned mask, const Where& where) {
  std::string text = name(op);
  if (op >= Op::kSyncwarp) text += format(" with mask %08x", mask);
  return text + format(" at %s:%u", where.file_name(), static_cast<unsigned>(where.line()));
}

std::string describe(const Thread& t) {
  const unsigned me = 1u << t.lane;
  if (!(warps[t.warp].alive & me)) return "exited";
  if (warps[t.warp].not_started & me) return "not started";
  if (t.op == Op::kNone) return &t == current ? "running" : "ready to go on";
  return "waits in " + describe(t.op, t.mask, t.where);
}

// The current thread has done something illegal. Reports what each thread of the block does, and
// ends the process.
[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "cuda_on_cpu: launch %llu, block (%u,%u,%u), thread %u of %u: %s\n",
               static_cast<unsigned long long>(launches), blockIdx.x, blockIdx.y, blockIdx.z,
               current->number, block_threads, what.c_str());
  std::map<std::string, std::vector<unsigned>> groups;
  for (unsigned i = 0; i < block_threads; ++i) groups[describe(threads[i])].push_back(i);
  for (const auto& [what_they_do, numbers] : groups) {
    std::fprintf(stderr, "  %s: thread", what_they_do.c_str());
    for (size_t i = 0, j; i < numbers.size(); i = j) {
      for (j = i + 1; j < numbers.size() && numbers[j] == numbers[j - 1] + 1;) ++j;
      std::fprintf(stderr, j - i > 1 ? " %u-%u" : " %u", numbers[i], numbers[j - 1]);
    }
    std::fprintf(stderr, "\n");
  }
  std::abort();
}

// The thread to run next, or null if all have exited.
Thread* pick() {
  if (runnable_warps.count == 0) {
    if (alive_threads == 0) return nullptr;
    fail("deadlock, every thread that has not exited waits");
  }
  if (!running_warp) running_warp = runnable_warps.draw_position();
  const unsigned warp = runnable_warps.members[*running_warp];
  Urn& lanes = warps[warp].runnable;
  const unsigned lane = lanes.remove(lanes.draw_position());
  if (lanes.count == 0) {
    runnable_warps.remove(*running_warp);
    running_warp.reset();
  }
  return &threads[warp * kWarpThreads + lane];
}

void enter(Thread* thread) {
  current = thread;
  threadIdx = thread->index;
}

// The current thread, which waits or is runnable, lets others run until it is picked.
void yield() {
  Thread* next = pick();
  if (next == current) return;
  current->fiber = running;
  enter(next);
  switch_to(next->fiber ? std::exchange(next->fiber, nullptr) : take_fiber());
}

void exit_thread() {
  Warp& warp = warps[current->warp];
  const unsigned me = 1u << current->lane;
  warp.alive &= ~me;
  --alive_threads;
  if (barrier.arrived) fail("exited although threads of its block wait at a barrier");
  for (unsigned i = 0; i < warp.group_count; ++i)
    if (warp.groups[i].mask & me)
      fail(format("exited although lanes wait for it at %s with mask %08x", name(warp.groups[i].op),
                  warp.groups[i].mask));
}

// What a fiber does all its life. It is entered with a new thread as the current one.
void run_threads() noexcept {
  arrived();
  for (;;) {
    warps[current->warp].not_started &= ~(1u << current->lane);
    body(call);
    exit_thread();
    Thread* next = pick();
    if (next) enter(next);
    if (next == nullptr || next->fiber) {
      idle_fibers.push_back(running);
      switch_to(next ? std::exchange(next->fiber, nullptr) : &launcher);
    }
  }
}

// Another warp may go first.
void make_runnable(unsigned warp, unsigned lanes) {
  Urn& runnable = warps[warp].runnable;
  if (runnable.count == 0) runnable_warps.add(warp);
  for (; lanes; lanes &= lanes - 1) {
    const unsigned lane = std::countr_zero(lanes);
    threads[warp * kWarpThreads + lane].op = Op::kNone;
    runnable.add(lane);
  }
  running_warp.reset();
}

void run_block() {
  barrier.arrived = 0;
  alive_threads = block_threads;
  for (unsigned w = 0; w * kWarpThreads < block_threads; ++w) {
    const unsigned lanes = std::min(kWarpThreads, block_threads - w * kWarpThreads);
    warps[w].alive = warps[w].not_started = ~0u >> (kWarpThreads - lanes);
    warps[w].group_count = 0;
    make_runnable(w, warps[w].alive);
  }
  enter(pick());
  switch_to(take_fiber());
}

void finish(const Group& group, Thread* lanes) {
  unsigned ballot = 0;
  for (unsigned bits = group.mask; bits; bits &= bits - 1) {
    const int lane = std::countr_zero(bits);
    ballot |= static_cast<unsigned>(lanes[lane].value & 1) << lane;
  }
  for (unsigned bits = group.mask; bits; bits &= bits - 1) {
    Thread& t = lanes[std::countr_zero(bits)];
    if (group.op == Op::kBallot) t.result = ballot;
    else if (group.op == Op::kAny) t.result = ballot != 0;
    else if (group.op == Op::kAll) t.result = ballot == group.mask;
    else  // the value of a lane that takes no part is undefined
      t.result = group.mask >> t.source & 1 ? lanes[t.source].value : random();
  }
}

uint64_t warp_collective(Op op, unsigned mask, uint64_t value, unsigned source, Where where) {
  Thread& t = *current;
  Warp& warp = warps[t.warp];
  const unsigned me = 1u << t.lane;
  if (!(mask & me))
    fail(describe(op, mask, where) + format(", which does not name the calling lane %u", t.lane));
  if (const unsigned gone = mask & ~warp.alive)
    fail(describe(op, mask, where) +
         format(", which names lanes that have exited or do not exist: %08x", gone));
  t.op = op;
  t.mask = mask;
  t.where = where;
  t.value = value;
  t.source = source;

  Group* group = nullptr;
  for (Group* g = warp.groups; g != warp.groups + warp.group_count; ++g) {
    if (g->op == op && g->mask == mask) group = g;
    else if ((g->mask & me) && (g->arrived & mask))
      fail(describe(op, mask, where) +
           format(" meets lanes %08x at %s with mask %08x", g->arrived, name(g->op), g->mask));
  }
  if (group == nullptr) {
    group = &warp.groups[warp.group_count++];
    *group = {op, mask, 0};
  }
  group->arrived |= me;
  if (group->arrived == mask) {
    finish(*group, &threads[t.warp * kWarpThreads]);
    *group = warp.groups[--warp.group_count];
    make_runnable(t.warp, mask);
  }
  yield();
  return t.result;
}

}  // namespace

unsigned warp_vote(Op op, unsigned mask, bool predicate, Where where) {
  return static_cast<unsigned>(warp_collective(op, mask, predicate, current->lane, where));
}

uint64_t warp_shuffle(Op op, unsigned mask, uint64_t value, int operand, int width, Where where) {
  if (width < 1 || width > 32 || !std::has_single_bit(static_cast<unsigned>(width)))
    fail(describe(op, mask, where) + format(" and width %d, which is not a power of two", width));
  const int64_t lane = current->lane, first = lane & -width, last = first + width - 1;
  int64_t source = lane;
  if (op == Op::kShfl) source = first + (operand & (width - 1));
  if (op == Op::kShflUp) source = lane - static_cast<unsigned>(operand);
  if (op == Op::kShflDown) source = lane + static_cast<unsigned>(operand);
  if (op == Op::kShflXor) source = lane ^ (operand & 31);
  // Out of its segment a lane gets its own value; only xor may reach into earlier segments.
  if (source > last || (source < first && op != Op::kShflXor)) source = lane;
  return warp_collective(op, mask, value, static_cast<unsigned>(source), where);
}

int block_barrier(Op op, bool predicate, Where where) {
  Thread& t = *current;
  t.op = op;
  t.where = where;
  if (alive_threads != block_threads)
    fail(describe(op, 0, where) + " reached after threads of the block have exited");
  if (barrier.arrived == 0) {
    barrier.op = op;
    barrier.where = where;
    barrier.trues = 0;
  } else if (barrier.op != op || !same(barrier.where, where)) {
    fail(describe(op, 0, where) + " reached while others wait at another barrier");
  }
  barrier.trues += predicate;
  if (++barrier.arrived == block_threads) {
    barrier.result = op == Op::kSyncthreadsOr    ? barrier.trues != 0
                     : op == Op::kSyncthreadsAnd ? barrier.trues == block_threads
                                                 : static_cast<int>(barrier.trues);
    barrier.arrived = 0;
    for (unsigned w = 0; w * kWarpThreads < block_threads; ++w) make_runnable(w, warps[w].alive);
  }
  yield();
  return barrier.result;
}

uint64_t random() {  // splitmix64
  uint64_t x = random_state += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

void scribble(void* to, size_t bytes) {
  std::byte* p = static_cast<std::byte*>(to);
  for (; bytes >= sizeof(uint64_t); bytes -= sizeof(uint64_t), p += sizeof(uint64_t)) {
    const uint64_t x = random();
    std::memcpy(p, &x, sizeof(x));
  }
  for (; bytes; --bytes) *p++ = static_cast<std::byte>(random());
}

std::unique_lock<std::mutex> start_launch() {
  std::unique_lock lock(mutex);
  ++launches;
  return lock;
}

namespace {

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t check(const cudaLaunchConfig_t& c, size_t parameter_bytes) {
  const dim3 &grid = c.gridDim, &block = c.blockDim;
  const uint64_t block_threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || block_threads == 0 || block.x > kMaxThreads || block.y > kMaxThreads ||
      block.z > 64 || block_threads > kMaxThreads || c.dynamicSmemBytes > kMaxSharedBytes)
    return cudaErrorInvalidConfiguration;
  return parameter_bytes > kMaxParameterBytes ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes, Body kernel_body,
                   const void* kernel_call) {
  if (const cudaError_t error = check(config, parameter_bytes)) return last_error = error;
  const auto lock = start_launch();
  body = kernel_body;
  call = kernel_call;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block_threads = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned i = 0; i < block_threads; ++i) {
    threads[i].number = i;
    threads[i].warp = i / kWarpThreads;
    threads[i].lane = i % kWarpThreads;
    threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }

  std::vector<uint64_t> blocks(uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  for (size_t i = blocks.size(); !sequential && i > 1; --i)
    std::swap(blocks[i - 1], blocks[random() % i]);

#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(tiger_ext::tiger_ext_shared_memory + config.dynamicSmemBytes,
                              kMaxSharedBytes - config.dynamicSmemBytes);
#endif
  for (const uint64_t b : blocks) {
    blockIdx = {static_cast<unsigned>(b % gridDim.x),
                static_cast<unsigned>(b / gridDim.x % gridDim.y),
                static_cast<unsigned>(b / gridDim.x / gridDim.y)};
    scribble(tiger_ext::tiger_ext_shared_memory, config.dynamicSmemBytes);
    run_block();
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(tiger_ext::tiger_ext_shared_memory, kMaxSharedBytes);
#endif
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

// --- Runtime API and the tests' controls ---------------------------------------------------------

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaSuccess) return "cudaSuccess";
  if (error == cudaErrorInvalidValue) return "cudaErrorInvalidValue";
  if (error == cudaErrorMemoryAllocation) return "cudaErrorMemoryAllocation";
  if (error == cudaErrorInvalidConfiguration) return "cudaErrorInvalidConfiguration";
  if (error == cudaErrorNotReady) return "cudaErrorNotReady";
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

static bool capturing = false;

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return cudaSuccess;
}

// Events tell of work that has been done, but for that which streams are told to be busy with.
struct CUevent_st {
  uint64_t record = 0;
};
static bool busy = false;
static uint64_t records = 0, done = 0;
static int64_t events = 0;

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
  *event = new CUevent_st;
  ++events;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t /*stream*/) {
  event->record = ++records;
  if (!busy) done = records;
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->record <= done ? cudaSuccess : cuda_on_cpu::last_error = cudaErrorNotReady;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  --events;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned /*flags*/) {
  constexpr size_t kAlignment = 512;
  *pointer = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (*pointer == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*pointer, 0xa5, bytes);  // nobody should rely on zeros
  return cudaSuccess;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cuda_on_cpu_seed(uint64_t seed) {
  const std::lock_guard lock(cuda_on_cpu::mutex);
  cuda_on_cpu::random_state = seed;
}

// Streams say that they are being captured, while kernels run as ever.
EXPORT void cuda_on_cpu_capture(int on) { capturing = on != 0; }

// Streams say that the work they are given from now on has yet to be done, while kernels run as
// ever.
EXPORT void cuda_on_cpu_busy(int on) {
  busy = on != 0;
  if (!busy) done = records;
}

// How many there are.
EXPORT int64_t cuda_on_cpu_events() { return events; }

EXPORT uint64_t cuda_on_cpu_launches() {
  const std::lock_guard lock(cuda_on_cpu::mutex);
  return cuda_on_cpu::launches;
}

// 1: blocks and threads in order, for debugging.
EXPORT void cuda_on_cpu_sequential(int on) {
  const std::lock_guard lock(cuda_on_cpu::mutex);
  cuda_on_cpu::sequential = on != 0;
}
