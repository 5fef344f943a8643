// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace tiger_ext {

// Asks the system to back [data, data + bytes) with huge pages; with `in_use`, also where there are
// small pages already, which are copied (about 2.7 s a GB). A random row costs a page walk, and
// with 4 KiB pages of a large table the walk itself misses the caches. Contents never change. It is
// only advice, which the system may decline; TIGER_EXT_HUGE_PAGES=0 does not ask.
void advise_huge_pages(void* data, size_t bytes, bool in_use);

}  // namespace tiger_ext
