// SPDX-License-Identifier: Apache-2.0
#include "cpu/huge_pages.h"

#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tiger_ext {

#if defined(__linux__)
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; older C libraries do not name it

bool wanted() {
  const char* choice = std::getenv("TIGER_EXT_HUGE_PAGES");
  return !choice || std::string(choice) != "0";
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes, bool in_use) {
  static const bool enabled = wanted();
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (start + bytes) & ~(kHugePage - 1);
  if (!enabled || first >= last) return;
  void* const aligned = reinterpret_cast<void*>(first);
  // Declined (file mappings, transparent huge pages switched off, old kernels): pages stay small.
  if (madvise(aligned, last - first, MADV_HUGEPAGE) == 0 && in_use)
    (void)madvise(aligned, last - first, kCollapse);
}
#else
void advise_huge_pages(void*, size_t, bool) {}
#endif

}  // namespace tiger_ext
