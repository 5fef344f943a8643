// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace tiger_ext {

// Asks the system to back [data, data + bytes) with huge pages; with `present`, also memory that is
// already in use. A random row costs a page walk, and with 4 KiB pages of a table of gigabytes the
// walk itself misses the caches. Only advice: contents never change, and where the system declines
// (or TIGER_EXT_HUGE_PAGES=0, or transparent huge pages are set to "never") nothing happens.
void advise_huge_pages(void* data, size_t bytes, bool present);

}  // namespace tiger_ext
