// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace tiger_ext {

// A random row costs a page walk, and with 4 KiB pages of a large table the walk itself misses the
// caches. Contents never change. It is only advice, which the system may decline;
// TIGER_EXT_HUGE_PAGES=0 does not ask.

// Asks the system to back what is not yet written of [data, data + bytes) with huge pages.
void advise_huge_pages(void* data, size_t bytes);

// Moves what is written of [data, data + bytes), small pages which the system copies, to huge
// pages. Returns 0, or the system's error number where it declines. Takes 0.3 s a GB, where a
// virtual machine's host must first provide the memory 3 s, and page faults of the process wait
// meanwhile: call it for a small part at a time.
int move_to_huge_pages(void* data, size_t bytes);

}  // namespace tiger_ext
