// SPDX-License-Identifier: Apache-2.0
#include "dense_cuda.cu"
