// SPDX-License-Identifier: Apache-2.0
#include "row_plan_cuda.cu"
