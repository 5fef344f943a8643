// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace tiger_ext {

// Binds what tiger_ext's optimizers call: Step, Rule, History, catch_up, Faults, UpdateError.
void bind_eager(pybind11::module_& m);

}  // namespace tiger_ext
