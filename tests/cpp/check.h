// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      if (++failures <= 20)                                                          \
        std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                                \
  } while (false)
