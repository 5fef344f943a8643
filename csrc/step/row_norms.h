// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace tiger_ext {

// The p-norms, float64 [grads], of sparse gradients on the CPU, whose duplicate entries are summed
// on the way. Throws UpdateError, its position that of the gradient.
at::Tensor row_norms(const std::vector<at::Tensor>& grads, double p);

}  // namespace tiger_ext
