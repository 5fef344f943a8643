// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace tiger_ext {

// A random row costs a page walk, and with 4 KiB pages of a large table the walk itself misses the
// caches. Contents never change. It is only advice, which the system may decline.

// Whether it is to be asked at all: not with TIGER_EXT_HUGE_PAGES=0.
bool huge_pages_wanted();

// Asks the system to back what is not yet written of [data, data + bytes) with huge pages.
void advise_huge_pages(void* data, size_t bytes);

// Moves the 2 MiB at `page`, a multiple of it, from small pages to a huge page, if at least half of
// them exist. Returns 0; -1 if they do not exist; or the system's error number where it declines.
// Takes half a millisecond, where a virtual machine's host must first provide the memory 6 ms.
int move_to_huge_page(void* page);

}  // namespace tiger_ext
