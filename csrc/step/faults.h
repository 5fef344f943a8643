// SPDX-License-Identifier: Apache-2.0
//
// Where errors happen, and how a device tells of them. No torch; host and device.
#pragma once

#include <cstdint>

namespace tiger_ext {

// A parameter of an optimizer.
struct UpdatePlace {
  int group = 0;
  int position = 0;
};

// What a device's kernels found wrong while the host did not wait for them. It lies in memory that
// both see. The kernels drop the entries concerned; the optimizer's next step throws.
struct RowFault {
  enum Kind : int64_t {
    kIndexOutOfRange,
    kNotCoalesced,
    kHistoryFull,  // a step's hyperparameters were not noted; `rows` could be
    kRateTooLarge  // lr * weight_decay was at least 1 in a lazy mode
  };
  int64_t count;  // of the entries concerned since the last report; the rest describes one of them
  int64_t kind;
  int64_t group;
  int64_t position;
  int64_t entry;
  int64_t index;
  int64_t dimension;
  int64_t rows;
};

}  // namespace tiger_ext
