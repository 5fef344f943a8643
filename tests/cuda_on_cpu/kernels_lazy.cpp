// SPDX-License-Identifier: Apache-2.0
#include "lazy_cuda.cu"
