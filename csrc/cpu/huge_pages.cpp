// SPDX-License-Identifier: Apache-2.0
#include "cpu/huge_pages.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tiger_ext {

#if defined(__linux__)
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// Older C libraries do not name them.
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14
constexpr int kCollapse = 25;       // MADV_COLLAPSE, Linux 6.1

bool enabled() {
  static const bool wanted = [] {
    const char* choice = std::getenv("TIGER_EXT_HUGE_PAGES");
    return !choice || std::string(choice) != "0";
  }();
  return wanted;
}

struct Range {
  uintptr_t first, last;
  size_t bytes() const { return first < last ? last - first : 0; }
  void* data() const { return reinterpret_cast<void*>(first); }
};

// The whole huge pages within [data, data + bytes).
Range huge_pages_in(void* data, size_t bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  return {(start + kHugePage - 1) & ~(kHugePage - 1), (start + bytes) & ~(kHugePage - 1)};
}

// Whether at least half of a huge page's small pages exist: moving fewer would cost memory.
bool is_in_use(uintptr_t page) {
  static const size_t small = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> there(kHugePage / small);
  if (mincore(reinterpret_cast<void*>(page), kHugePage, there.data()) != 0) return false;
  const auto resident = [](unsigned char flags) { return (flags & 1) != 0; };
  return 2 * std::count_if(there.begin(), there.end(), resident) >=
         static_cast<ptrdiff_t>(there.size());
}

// Takes a huge page and gives it back, for the system to find it at hand. While it moves pages it
// keeps every page fault of the process waiting, and in a virtual machine the first write to memory
// that the host has not provided yet takes 5 ms a huge page, ten times the move itself.
void fetch_huge_page() {
  void* const got =
      mmap(nullptr, 2 * kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return;
  void* const page = huge_pages_in(got, 2 * kHugePage).data();
  if (madvise(page, kHugePage, MADV_HUGEPAGE) == 0) (void)madvise(page, kHugePage, kPopulateWrite);
  munmap(got, 2 * kHugePage);
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  const Range range = huge_pages_in(data, bytes);
  // Declined (file mappings, transparent huge pages switched off): pages stay small.
  if (enabled() && range.bytes() > 0) (void)madvise(range.data(), range.bytes(), MADV_HUGEPAGE);
}

int move_to_huge_pages(void* data, size_t bytes) {
  const Range range = huge_pages_in(data, bytes);
  if (!enabled()) return EPERM;
  int refusal = 0;
  for (uintptr_t page = range.first; page < range.last; page += kHugePage) {
    if (!is_in_use(page)) continue;
    fetch_huge_page();
    if (madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse) != 0) refusal = errno;
  }
  return refusal;
}
#else
void advise_huge_pages(void*, size_t) {}
int move_to_huge_pages(void*, size_t) { return -1; }
#endif

}  // namespace tiger_ext
