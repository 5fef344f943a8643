// SPDX-License-Identifier: Apache-2.0
#include "huge_pages.h"

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

bool wanted() {
  const char* choice = std::getenv("TIGER_EXT_HUGE_PAGES");
  return !choice || std::string(choice) != "0";
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  static const bool enabled = wanted();
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (start + bytes) & ~(kHugePage - 1);
  if (enabled && first < last)
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
#else
void advise_huge_pages(void*, size_t) {}
#endif

}  // namespace tiger_ext
