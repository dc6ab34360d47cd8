// SPDX-License-Identifier: Apache-2.0

// drex on a CUDA device: the kernels against references in f64, the C ABI on
// the device against the C ABI on the host, and how near the kernels come to
// the memory's speed.
//
//   gpu-kernels test  IMAGE                    what `cargo xtask test --kernels` does on a CPU
//   gpu-kernels bench IMAGE JSON [OTHER...]    bandwidths; writes JSON. OTHER is probe=IMAGE, of probe.cu, or
//                                              CHUNKxTHREADS=IMAGE, the kernels compiled with other chunks
//
// IMAGE is kernels/prebuilt/drex.fatbin or what kernels/compile.sh made. Only
// the driver API is used, so that the tests' driver without a device runs this
// as well.

#include "kernels_bench.h"
#include "kernels_test.h"

int main(int argc, char ** argv) {
    const bool is_test = argc == 3 && strcmp(argv[1], "test") == 0;
    const bool is_bench = argc >= 4 && strcmp(argv[1], "bench") == 0;
    if (!is_test && !is_bench) {
        fprintf(stderr, "usage: gpu-kernels test IMAGE | gpu-kernels bench IMAGE JSON [OTHER...]\n");
        return 2;
    }
    // What was printed stays when the time is up.
    setvbuf(stdout, nullptr, _IOLBF, 0);
    CU(cuInit(0));
    CUdevice device;
    CUcontext context;
    CU(cuDeviceGet(&device, 0));
    CU(cuDevicePrimaryCtxRetain(&context, device));
    CU(cuCtxSetCurrent(context));
    // Small shapes: on the driver without a device, and under a sanitizer.
    const char * text = getenv("DREX_GPU_SMALL");
    const bool small = text && *text == '1';
    int status;
    {
        const Device d(argv[2]);
        status = is_test ? test(d, small) : bench(d, argv[3], argc - 4, argv + 4, small);
    }
    CU(cuDevicePrimaryCtxRelease(device));
    return status;
}
