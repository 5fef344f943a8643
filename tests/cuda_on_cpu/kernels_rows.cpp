// SPDX-License-Identifier: Apache-2.0
#include "rows_cuda.cu"
