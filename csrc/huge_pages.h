// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace tiger_ext {

// Asks the system to back the fresh memory [data, data + bytes) with huge pages. A random row costs
// a page walk, and with 4 KiB pages of a table of gigabytes the walk itself misses the caches. Only
// advice, which the system may decline; TIGER_EXT_HUGE_PAGES=0 does not ask.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace tiger_ext
