// SPDX-License-Identifier: Apache-2.0
#include "huge_pages.h"

#include <cstdint>
#include <cstdlib>
#include <fstream>
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
  if (choice && std::string(choice) == "0") return false;
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string setting;
  std::getline(file, setting);
  return !setting.empty() && setting.find("[never]") == std::string::npos;
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes, bool present) {
  static const bool enabled = wanted();
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (start + bytes) & ~(kHugePage - 1);
  if (!enabled || first >= last) return;
  void* const aligned = reinterpret_cast<void*>(first);
  // Advice may be declined (file mappings, old kernels): then the pages stay as they are.
  if (madvise(aligned, last - first, MADV_HUGEPAGE) == 0 && present)
    (void)madvise(aligned, last - first, kCollapse);
}
#else
void advise_huge_pages(void*, size_t, bool) {}
#endif

}  // namespace tiger_ext
