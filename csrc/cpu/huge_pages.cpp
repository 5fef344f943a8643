// SPDX-License-Identifier: Apache-2.0
#include "cpu/huge_pages.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/ioctl.h>
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

// Huge pages begin at its multiples.
uintptr_t rounded_up(uintptr_t address) { return (address + kHugePage - 1) & ~(kHugePage - 1); }

// Whether at least half of a huge page's small pages exist: moving fewer would cost memory.
bool is_in_use(void* page) {
  static const size_t small = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> there(kHugePage / small);
  if (mincore(page, kHugePage, there.data()) != 0) return false;
  const auto resident = [](unsigned char flags) { return (flags & 1) != 0; };
  return 2 * std::count_if(there.begin(), there.end(), resident) >=
         static_cast<ptrdiff_t>(there.size());
}

// The argument of PAGEMAP_SCAN, Linux 6.7.
struct PageScan {
  uint64_t size = sizeof(PageScan), flags = 0, start = 0, end = 0, walk_end = 0, regions = 0;
  uint64_t region_count = 0, max_pages = 0, inverted = 0, all_of = 0, any_of = 0, returned = 0;
};
struct PageRegion {
  uint64_t start, end, categories;
};

// Whether it is a huge page already; false where the system cannot say.
bool is_huge(void* page) {
  constexpr uint64_t kIsHuge = uint64_t{1} << 6;
  const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (map < 0) return false;
  PageRegion region{};
  PageScan scan;
  scan.start = reinterpret_cast<uintptr_t>(page);
  scan.end = scan.start + kHugePage;
  scan.regions = reinterpret_cast<uintptr_t>(&region);
  scan.region_count = 1;
  scan.all_of = scan.returned = kIsHuge;
  const int found = ioctl(map, _IOWR('f', 16, PageScan), &scan);
  close(map);
  return found == 1 && region.start == scan.start && region.end == scan.end;
}

// Takes a huge page and gives it back, for the system to find it at hand. While it moves pages it
// keeps every page fault of the process waiting, and in a virtual machine the first write to memory
// that the host has not provided yet takes 5 ms a huge page: 5.3 ms a move without this, 0.5 with.
void fetch_huge_page() {
  void* const got =
      mmap(nullptr, 2 * kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return;
  void* const page = reinterpret_cast<void*>(rounded_up(reinterpret_cast<uintptr_t>(got)));
  if (madvise(page, kHugePage, MADV_HUGEPAGE) == 0) (void)madvise(page, kHugePage, kPopulateWrite);
  munmap(got, 2 * kHugePage);
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = rounded_up(start), last = (start + bytes) & ~(kHugePage - 1);
  // Declined (file mappings, transparent huge pages switched off): pages stay small.
  if (huge_pages_wanted() && first < last)
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

int move_to_huge_page(void* page) {
  if (!huge_pages_wanted()) return EPERM;
  if (is_huge(page)) return 0;
  if (!is_in_use(page)) return -1;
  fetch_huge_page();
  return madvise(page, kHugePage, kCollapse) == 0 ? 0 : errno;
}
#else
void advise_huge_pages(void*, size_t) {}
int move_to_huge_page(void*) { return ENOSYS; }
#endif

bool huge_pages_wanted() {
  static const bool wanted = [] {
    const char* choice = std::getenv("TIGER_EXT_HUGE_PAGES");
    return !choice || std::string(choice) != "0";
  }();
  return wanted;
}

}  // namespace tiger_ext
