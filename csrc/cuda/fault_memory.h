// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "step/faults.h"

namespace tiger_ext {

// Memory for one optimizer's faults, zeroed, in which kernels and the host see each other's writes.
// It is given back to a pool, never to the system: a kernel still under way may write there after
// the optimizer is gone. Fails with std::runtime_error where there is no such memory.
std::shared_ptr<RowFault> make_fault_memory();

// A zeroed word of such memory. It is never given back: kernels write to it at every step, and
// whoever had it next would read what belongs to another.
uint64_t* make_note_memory();

}  // namespace tiger_ext
