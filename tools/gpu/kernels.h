// SPDX-License-Identifier: Apache-2.0

// What kernels.cpp's tests and measurements work with: device memory, the
// kernels of an image, formats of logits.

#pragma once

#include <cuda.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../../include/drex.h"
#include "../../kernels/args.h"

#define CU(call)                                                                         \
    do {                                                                                 \
        const CUresult r_ = (call);                                                      \
        if (r_ != CUDA_SUCCESS) {                                                        \
            const char * t_ = "unknown error";                                           \
            cuGetErrorString(r_, &t_);                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, t_);           \
            exit(1);                                                                     \
        }                                                                                \
    } while (0)

#define DREX(call)                                                                       \
    do {                                                                                 \
        if ((call) != DREX_OK) {                                                         \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, drex_last_error());       \
            exit(1);                                                                     \
        }                                                                                \
    } while (0)

namespace {

inline int failures = 0, comparisons = 0;

void check(bool good, const std::string & what) {
    comparisons++;
    if (!good && failures++ < 20) {
        printf("FAILED  %s\n", what.c_str());
    }
}

struct Random {
    uint64_t x;
    explicit Random(uint64_t seed) : x(seed * 0x9e3779b97f4a7c15ull | 1) {}
    uint64_t next() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        return x;
    }
    float unit() { return static_cast<float>(next() >> 40) / (1 << 24) - 0.5f; }
};

// The lists of kernels/cases.txt.
std::vector<uint32_t> cases(const std::string & name) {
    std::ifstream file(DREX_CASES);
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string first;
        if (words >> first && first == name) {
            return {std::istream_iterator<uint32_t>(words), {}};
        }
    }
    fprintf(stderr, "%s: no %s\n", DREX_CASES, name.c_str());
    exit(2);
}

// Device memory.
struct Memory {
    CUdeviceptr at = 0;
    size_t bytes;
    explicit Memory(size_t n) : bytes(n) { CU(cuMemAlloc(&at, n)); }
    // The stream that the kernels run on is not ordered behind the default one.
    Memory(const void * from, size_t n) : Memory(n) {
        CU(cuMemcpyHtoD(at, from, n));
        CU(cuCtxSynchronize());
    }
    Memory(const Memory &) = delete;
    Memory(Memory && o) noexcept : at(o.at), bytes(o.bytes) { o.at = 0; }
    ~Memory() {
        if (at) {
            cuMemFree(at);
        }
    }
    template <typename T>
    std::vector<T> read(size_t n) const {
        std::vector<T> v(n);
        CU(cuMemcpyDtoH(v.data(), at, n * sizeof(T)));
        return v;
    }
};

// Row numbers, inside a launch or in pinned memory.
struct Numbers {
    uint32_t * list = nullptr;
    DrexRows rows = {};

    Numbers(const std::vector<uint32_t> & numbers, bool listed, uint32_t source) {
        rows.n = static_cast<uint32_t>(numbers.size());
        if (!listed) {
            std::copy(numbers.begin(), numbers.end(), rows.here);
            return;
        }
        CU(cuMemHostAlloc(reinterpret_cast<void **>(&list), (2 + numbers.size()) * 4, CU_MEMHOSTALLOC_DEVICEMAP));
        list[0] = rows.n;
        list[1] = source;
        std::copy(numbers.begin(), numbers.end(), list + 2);
        CUdeviceptr there;
        CU(cuMemHostGetDevicePointer(&there, list, 0));
        rows.there = reinterpret_cast<const uint32_t *>(there);
        rows.n = 0;
    }
    Numbers(const Numbers &) = delete;
    ~Numbers() {
        if (list) {
            cuMemFreeHost(list);
        }
    }
};

enum Type { F32, F16, BF16 };
const char * const TYPES[] = {"f32", "f16", "bf16"};
const size_t ELEMENT[] = {4, 2, 2};
const drex_dtype DTYPES[] = {DREX_DTYPE_F32, DREX_DTYPE_F16, DREX_DTYPE_BF16};

uint32_t bits_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

float of_bits(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

// To the nearest; what is too large becomes infinite. Test rows only.
uint16_t to_half(float x) {
    const uint32_t b = bits_of(x), sign = b >> 16 & 0x8000;
    const float a = fabsf(x);
    if (isnan(x)) {
        return static_cast<uint16_t>(sign | 0x7e00);
    }
    if (a >= 65520.0f) {
        return static_cast<uint16_t>(sign | 0x7c00);
    }
    if (a < 6.103515625e-5f) {
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(lrintf(a * 16777216.0f)));
    }
    const uint32_t m = bits_of(a) - (112u << 23);
    return static_cast<uint16_t>(sign | ((m + 0xfff + (m >> 13 & 1)) >> 13));
}

float from_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = h >> 10 & 31, f = h & 1023;
    if (e == 31) {
        return of_bits(sign | 0x7f800000 | f << 13);
    }
    if (e == 0) {
        const float x = static_cast<float>(f) / 16777216.0f;
        return sign ? -x : x;
    }
    return of_bits(sign | (e + 112) << 23 | f << 13);
}

// As stored, and what is stored.
std::vector<char> store(const std::vector<float> & row, Type type, std::vector<double> & values) {
    std::vector<char> out(row.size() * ELEMENT[type]);
    values.resize(row.size());
    for (size_t i = 0; i < row.size(); i++) {
        if (type == F32) {
            memcpy(&out[i * 4], &row[i], 4);
            values[i] = row[i];
        } else {
            const uint16_t h = type == F16 ? to_half(row[i]) : static_cast<uint16_t>(bits_of(row[i]) >> 16);
            memcpy(&out[i * 2], &h, 2);
            values[i] = type == F16 ? from_half(h) : of_bits(static_cast<uint32_t>(h) << 16);
        }
    }
    return out;
}

struct Device {
    CUmodule module = nullptr;
    CUstream stream = nullptr;
    CUfunction ramp[2][3], fill, copy_rows;
    std::string name = "drex";
    uint32_t chunk, threads;

    // An image that was compiled with other chunks has another name.
    explicit Device(const char * image, const std::string & variant = "") : chunk(DREX_RAMP_CHUNK), threads(DREX_RAMP_THREADS) {
        if (!variant.empty()) {
            name = variant;
            if (sscanf(variant.c_str(), "%ux%u", &chunk, &threads) != 2) {
                fprintf(stderr, "%s: not CHUNKxTHREADS\n", variant.c_str());
                exit(2);
            }
        }
        std::ifstream file(image, std::ios::binary);
        const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
        if (bytes.empty()) {
            fprintf(stderr, "%s: cannot be read\n", image);
            exit(2);
        }
        CU(cuModuleLoadData(&module, bytes.data()));
        CU(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
        for (int t = 0; t < 3; t++) {
            CU(cuModuleGetFunction(&ramp[0][t], module, (std::string("drex_ramp_") + TYPES[t]).c_str()));
            CU(cuModuleGetFunction(&ramp[1][t], module, (std::string("drex_ramp_top_") + TYPES[t]).c_str()));
        }
        CU(cuModuleGetFunction(&fill, module, "drex_state_copy"));
        CU(cuModuleGetFunction(&copy_rows, module, "drex_copy_rows"));
    }
    Device(const Device &) = delete;
    ~Device() {
        cuStreamDestroy(stream);
        cuModuleUnload(module);
    }

    template <typename Args>
    void launch(CUfunction f, unsigned x, unsigned y, unsigned threads, const Args & args) const {
        void * list[] = {const_cast<Args *>(&args)};
        CU(cuLaunchKernel(f, x, y, 1, threads, 1, 1, 0, stream, list, nullptr));
    }

    void wait() const { CU(cuStreamSynchronize(stream)); }
};

// Scratch memory and arguments for rows of one kind.
struct Ramp {
    const Device & d;
    uint32_t chunks;
    Memory partial, partial_top, arrived, out, out_top;
    DrexRampArgs args = {};

    Ramp(const Device & d, uint32_t rows, uint32_t n, uint32_t top)
        : d(d),
          chunks((n + d.chunk - 1) / d.chunk),
          partial(rows * chunks * sizeof(DrexMoments)),
          partial_top(rows * chunks * std::max(top, 1u) * sizeof(DrexTop)),
          arrived(rows * 4),
          out(rows * sizeof(DrexMoments)),
          out_top(rows * std::max(top, 1u) * sizeof(DrexTop)) {
        CU(cuMemsetD8(arrived.at, 0, rows * 4));
        CU(cuMemsetD8(out_top.at, 0, out_top.bytes));
        CU(cuCtxSynchronize());
        args.n_rows = rows;
        args.n_vocab = n;
        args.n_chunks = chunks;
        args.n_top = top;
        args.partial = reinterpret_cast<DrexMoments *>(partial.at);
        args.partial_top = reinterpret_cast<DrexTop *>(partial_top.at);
        args.arrived = reinterpret_cast<uint32_t *>(arrived.at);
        args.out = reinterpret_cast<DrexMoments *>(out.at);
        args.out_top = reinterpret_cast<DrexTop *>(out_top.at);
    }

    void launch(Type type, CUdeviceptr logits, uint64_t stride, bool weighted) {
        args.logits = reinterpret_cast<void *>(logits);
        args.row_stride = stride;
        args.vectors = ((logits | stride) & 15) == 0;
        args.weighted = weighted;
        d.launch(d.ramp[args.n_top > 0][type], args.n_rows * chunks, 1, d.threads, args);
    }
};

CUgraphExec captured(const Device & d, const std::function<void()> & calls) {
    CUgraph graph;
    CUgraphExec exec;
    CU(cuStreamBeginCapture(d.stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    calls();
    CU(cuStreamEndCapture(d.stream, &graph));
    CU(cuGraphInstantiate(&exec, graph, 0));
    CU(cuGraphDestroy(graph));
    return exec;
}

}  // namespace
