// SPDX-License-Identifier: Apache-2.0
#include "careful_rows_cuda.cu"
