// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace tiger_ext {

// Binds row_norms: the norms of sparse gradients whose duplicate entries are summed on the way.
void bind_row_norms(pybind11::module_& m);

}  // namespace tiger_ext
