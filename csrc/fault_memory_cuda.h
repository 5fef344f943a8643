// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "faults.h"

namespace tiger_ext {

// Memory of sizeof(RowFault) bytes, zeroed, in which kernels and the host see each other's writes.
// It is given back to a pool, never to the system: a kernel still under way may write there after
// its owner is gone. Fails with std::runtime_error where there is no such memory.
std::shared_ptr<RowFault> make_fault_memory();

}  // namespace tiger_ext
