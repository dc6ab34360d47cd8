// SPDX-License-Identifier: Apache-2.0

// What the ramp is compared with: a kernel that reads as many bytes, adds them
// up, and does nothing else.

#include <stdint.h>

struct ProbeArgs {
    const uint4 * from;
    uint64_t n;  // vectors of 16 bytes
    uint32_t * out;
};

extern "C" __global__ void __launch_bounds__(256) drex_probe_read(const __grid_constant__ ProbeArgs a) {
    uint32_t sum = 0;
    const uint64_t step = (uint64_t) gridDim.x * 256;
    uint64_t i = (uint64_t) blockIdx.x * 256 + threadIdx.x;
    // Four loads under way in each thread.
    for (; i + 3 * step < a.n; i += 4 * step) {
        const uint4 v[4] = {__ldcs(a.from + i), __ldcs(a.from + i + step), __ldcs(a.from + i + 2 * step), __ldcs(a.from + i + 3 * step)};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
        }
    }
    for (; i < a.n; i += step) {
        const uint4 v = __ldcs(a.from + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    // Never true; the compiler does not know.
    if (sum == 0x9e3779b9 && a.n == 0) {
        *a.out = sum;
    }
}
