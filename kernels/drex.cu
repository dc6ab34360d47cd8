// SPDX-License-Identifier: Apache-2.0

// All kernels of drex, one module.

#include "ramp.cu"
#include "copy.cu"
