// SPDX-License-Identifier: Apache-2.0

// drex on a CUDA device: the kernels against references in f64, the C ABI on
// the device against the C ABI on the host, and how near the kernels come to
// the memory's speed.
//
//   gpu-kernels test  IMAGE         what `cargo xtask test --kernels` does on a CPU
//   gpu-kernels bench IMAGE [JSON]  bandwidths; writes JSON
//
// IMAGE is kernels/prebuilt/drex.fatbin or what kernels/compile.sh made. Only
// the driver API is used, so that the tests' driver without a device runs this
// as well.

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

int failures = 0, comparisons = 0;

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

enum Type { F32, F16, BF16 };
const char * const TYPES[] = {"f32", "f16", "bf16"};
const size_t ELEMENT[] = {4, 2, 2};

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

    explicit Device(const char * image) {
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

    template <typename Args>
    void launch(CUfunction f, unsigned x, unsigned y, unsigned threads, const Args & args) const {
        void * list[] = {const_cast<Args *>(&args)};
        CU(cuLaunchKernel(f, x, y, 1, threads, 1, 1, 0, stream, list, nullptr));
    }

    void wait() const { CU(cuStreamSynchronize(stream)); }
};

// Scratch memory and arguments for rows of one kind.
struct Ramp {
    uint32_t chunks;
    Memory partial, partial_top, arrived, out, out_top;
    DrexRampArgs args = {};

    Ramp(uint32_t rows, uint32_t n, uint32_t top)
        : chunks((n + DREX_RAMP_CHUNK - 1) / DREX_RAMP_CHUNK),
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

    void launch(const Device & d, Type type, CUdeviceptr logits, uint64_t stride, bool weighted) {
        args.logits = reinterpret_cast<void *>(logits);
        args.row_stride = stride;
        args.vectors = ((logits | stride) & 15) == 0;
        args.weighted = weighted;
        d.launch(d.ramp[args.n_top > 0][type], args.n_rows * chunks, 1, DREX_RAMP_THREADS, args);
    }
};

std::vector<std::vector<float>> rows_of(size_t n) {
    std::vector<std::vector<float>> out;
    const auto noise = [n](uint64_t seed, float scale) {
        Random r(seed);
        std::vector<float> v(n);
        for (float & x : v) {
            x = r.unit() * scale;
        }
        return v;
    };
    for (const float scale : {0.0f, 1.0f, 30.0f}) {
        out.push_back(noise(n, scale));
    }
    out.emplace_back(n, -INFINITY);
    out.emplace_back(n, -3e38f);
    for (const size_t at : {size_t{0}, n / 2, n - 1}) {
        for (const float hot : {1.0f, 80.0f, 60000.0f, 1e30f}) {
            std::vector<float> v(n, 0.0f);
            v[at] = hot;
            out.push_back(v);
        }
        for (const float bad : {NAN, INFINITY}) {
            std::vector<float> v = noise(7, 8.0f);
            v[at] = bad;
            out.push_back(v);
        }
        std::vector<float> v(n, -INFINITY);
        v[at] = -3.0f;
        out.push_back(v);
        v = noise(5, 1.0f);
        v[at] = v[n - 1] = 3.0f;
        out.push_back(v);
    }
    return out;
}

void test_ramp(const Device & d, uint32_t n, Type type, uint32_t top, bool aligned) {
    const auto rows = rows_of(n);
    const size_t bytes = n * ELEMENT[type], stride = aligned ? (bytes + 15) / 16 * 16 : bytes;
    const size_t offset = aligned ? 0 : ELEMENT[type];
    std::vector<char> memory(rows.size() * stride + offset + 16, 0x7f);
    std::vector<std::vector<double>> values(rows.size());
    for (size_t i = 0; i < rows.size(); i++) {
        const auto stored = store(rows[i], type, values[i]);
        memcpy(&memory[offset + i * stride], stored.data(), bytes);
    }
    const Memory logits(memory.data(), memory.size());
    const uint32_t n_rows = static_cast<uint32_t>(rows.size());
    Ramp ramp(n_rows, n, top);
    // Twice: the counters must be left as they were.
    for (int i = 0; i < 2; i++) {
        ramp.launch(d, type, logits.at + offset, stride, true);
    }
    d.wait();
    const auto found = ramp.out.read<DrexMoments>(n_rows);
    const auto tops = ramp.out_top.read<DrexTop>(n_rows * std::max(top, 1u));
    for (size_t i = 0; i < rows.size(); i++) {
        const auto & v = values[i];
        const std::string at = "ramp " + std::string(TYPES[type]) + " n = " + std::to_string(n) + " row " + std::to_string(i);
        bool bad = false, any = false;
        size_t best = 0;
        for (size_t j = 0; j < n; j++) {
            bad |= std::isnan(v[j]) || v[j] == INFINITY;
            any |= v[j] != -INFINITY;
            best = v[j] > v[best] ? j : best;
        }
        const DrexMoments & m = found[i];
        if (bad) {
            check(std::isnan(m.sum), at + ": a NaN or an infinity is not seen");
            continue;
        }
        if (!any) {
            check(m.top == -INFINITY && m.sum == 0.0f, at + ": all masked");
            continue;
        }
        double sum = 0, weighted = 0, second = -INFINITY;
        for (size_t j = 0; j < n; j++) {
            const double e = exp(v[j] - v[best]);
            sum += e;
            weighted += e > 0 ? (v[j] - v[best]) * e : 0;
            second = j == best ? second : std::max(second, v[j]);
        }
        check(m.token == static_cast<int32_t>(best) && m.top == v[best], at + ": top");
        check(m.second == second || n == 1, at + ": second");
        check(fabs(m.sum / sum - 1) < 3e-6, at + ": sum");
        check(fabs(m.weighted - weighted) < 3e-6 * (sum * log(n + 1.0) + 1), at + ": entropy");
        if (top) {
            std::vector<int32_t> order(n);
            for (uint32_t j = 0; j < n; j++) {
                order[j] = static_cast<int32_t>(j);
            }
            std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
                return v[static_cast<size_t>(a)] > v[static_cast<size_t>(b)];
            });
            bool good = true;
            for (uint32_t k = 0; k < top; k++) {
                good &= tops[i * top + k].token == (k < n ? order[k] : -1);
            }
            check(good, at + ": the greatest");
        }
    }
}

void test_fill(const Device & d, uint32_t unit, uint32_t k_units, uint32_t v_units, bool transposed) {
    const uint32_t layers = 7, cells = 40, source = 2;
    const size_t k_stride = k_units * unit, v_stride = transposed ? cells * unit : v_units * unit;
    const size_t sizes[2] = {cells * k_stride, transposed ? v_units * v_stride : cells * v_stride};
    std::vector<Memory> memory;
    std::vector<std::vector<char>> want;
    std::vector<DrexSide> sides;
    for (uint32_t l = 0; l < layers; l++) {
        for (int s = 0; s < 2; s++) {
            std::vector<char> bytes(std::max<size_t>(sizes[s], 1));
            Random r(l * 2 + static_cast<uint64_t>(s) + 1);
            for (char & b : bytes) {
                b = static_cast<char>(r.next() >> 32);
            }
            memory.emplace_back(bytes.data(), bytes.size());
            want.push_back(bytes);
            sides.push_back({reinterpret_cast<void *>(memory.back().at), s ? v_stride : k_stride});
        }
    }
    const uint32_t holes[] = {3, 39, 0, 17, 18, 19};
    const Memory table(sides.data(), sides.size() * sizeof(DrexSide));
    DrexFillArgs a = {};
    a.sides = reinterpret_cast<const DrexSide *>(table.at);
    a.n_layers = layers;
    a.source = source;
    a.layers_a_block = 3;
    a.shape[0] = {k_units, unit, 0};
    a.shape[1] = {v_units, unit, transposed};
    a.cells.n = 6;
    memcpy(a.cells.here, holes, sizeof holes);
    d.launch(d.fill, 3, 2, DREX_COPY_THREADS, a);
    d.wait();
    for (uint32_t l = source + 1; l < layers; l++) {
        for (const uint32_t c : holes) {
            memcpy(&want[l * 2][c * k_stride], &want[source * 2][c * k_stride], k_stride);
            for (uint32_t j = 0; j < v_units; j++) {
                const size_t at = transposed ? j * v_stride + c * unit : c * v_stride + j * unit;
                memcpy(&want[l * 2 + 1][at], &want[source * 2 + 1][at], unit);
            }
        }
    }
    bool good = true;
    for (size_t i = 0; i < want.size(); i++) {
        good &= memory[i].read<char>(want[i].size()) == want[i];
    }
    check(good, "fill, units of " + std::to_string(unit) + (transposed ? ", transposed" : ""));
}

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

// The same requests on the device and on the host; with `graphs`, the device's
// work is captured in the first step and launched again in all others.
void test_abi(const Device & d, uint32_t rows, uint32_t n, bool graphs) {
    const uint32_t layers = 6, ramp_layer = 2, row_bytes = 4096, cells = rows + 24, hidden = 512;
    const std::string name = std::string("C ABI") + (graphs ? ", graphs" : "") + ", " + std::to_string(rows) + " rows";
    const uint32_t ramps[] = {ramp_layer};
    drex_engine * engines[2];
    std::vector<Memory> on_device;
    std::vector<std::vector<char>> on_host;
    std::vector<drex_kv_layer> kv[2];
    for (uint32_t i = 0; i < layers * 2; i++) {
        std::vector<char> bytes(cells * row_bytes);
        Random r(i + 1);
        for (char & b : bytes) {
            b = static_cast<char>(r.next() >> 32);
        }
        on_device.emplace_back(bytes.data(), bytes.size());
        on_host.push_back(bytes);
    }
    for (int on = 0; on < 2; on++) {
        drex_config c = DREX_CONFIG_INITIALIZER;
        c.n_layers = layers;
        c.n_ramps = 1;
        c.ramp_layers = ramps;
        c.n_slots = c.max_requests = c.max_batch = rows;
        c.policy = DREX_POLICY_LATENCY;
        c.metric = DREX_METRIC_ENTROPY;
        c.device = on ? DREX_DEVICE_CUDA : DREX_DEVICE_HOST;
        DREX(drex_create(&c, &engines[on]));
        for (uint32_t l = 0; l < layers; l++) {
            drex_kv_layer k = DREX_KV_LAYER_INITIALIZER;
            k.n_cells = cells;
            k.k = on ? reinterpret_cast<void *>(on_device[l * 2].at) : on_host[l * 2].data();
            k.v = on ? reinterpret_cast<void *>(on_device[l * 2 + 1].at) : on_host[l * 2 + 1].data();
            k.k_row_bytes = k.k_cell_stride = k.v_row_bytes = k.v_cell_stride = row_bytes;
            kv[on].push_back(k);
        }
        DREX(drex_bind_kv(engines[on], kv[on].data(), layers));
        for (uint32_t i = 0; i < rows; i++) {
            drex_request_config q = DREX_REQUEST_CONFIG_INITIALIZER;
            q.id = i;
            DREX(drex_request_add(engines[on], &q));
        }
    }
    // In one place, as a captured ramp wants it.
    const Memory device(static_cast<size_t>(rows) * n * 4);
    std::vector<char> arena_bytes(static_cast<size_t>(rows) * hidden);
    for (size_t i = 0; i < arena_bytes.size(); i++) {
        arena_bytes[i] = static_cast<char>(i * 31 + i / hidden);
    }
    const Memory arena_memory(arena_bytes.data(), arena_bytes.size());
    const Memory dense_memory(arena_bytes.data(), arena_bytes.size());
    drex_arena arena = DREX_ARENA_INITIALIZER;
    arena.arena = reinterpret_cast<void *>(arena_memory.at);
    arena.dense = reinterpret_cast<void *>(dense_memory.at);
    arena.arena_stride_bytes = arena.dense_stride_bytes = arena.row_bytes = hidden;
    arena.stream = d.stream;
    CUgraphExec window_graph = nullptr, fill_graph = nullptr;

    for (uint64_t step = 0; step < 4; step++) {
        std::vector<float> logits(static_cast<size_t>(rows) * n);
        Random r(step + 9);
        for (float & x : logits) {
            x = r.unit() * 6;
        }
        for (uint32_t i = 0; i < rows; i++) {
            if ((i + step) % 3) {
                logits[static_cast<size_t>(i) * n + i * 11 % n] = 30;
            }
        }
        CU(cuMemcpyHtoD(device.at, logits.data(), logits.size() * 4));
        CU(cuCtxSynchronize());
        std::vector<drex_verdict> verdicts[2];
        std::vector<uint32_t> where(rows);
        for (uint32_t i = 0; i < rows; i++) {
            where[i] = cells - 1 - i;
        }
        for (int on = 0; on < 2; on++) {
            drex_engine * e = engines[on];
            for (uint32_t i = 0; i < rows; i++) {
                // In another order each time, so that rows have other slots.
                DREX(drex_request_ready(e, (i * 7 + step) % rows, 0, step * 10));
            }
            drex_plan_input in = DREX_PLAN_INPUT_INITIALIZER;
            drex_step out = DREX_STEP_INITIALIZER;
            std::vector<drex_row> planned(rows);
            in.now_ns = step * 10 + 1;
            DREX(drex_plan(e, &in, planned.data(), rows, &out));
            drex_logits l = DREX_LOGITS_INITIALIZER;
            l.data = on ? reinterpret_cast<void *>(device.at) : logits.data();
            l.row_stride_bytes = n * 4;
            l.n_rows = out.n_rows;
            l.n_vocab = n;
            l.stream = on ? d.stream : nullptr;
            verdicts[on].resize(rows);
            if (on) {
                if (graphs && !window_graph) {
                    window_graph = captured(d, [&] {
                        DREX(drex_gather(e, &arena));
                        DREX(drex_ramp_enqueue(e, &l));
                    });
                    fill_graph = captured(d, [&] { DREX(drex_fill_enqueue(e, d.stream)); });
                }
                if (graphs) {
                    CU(cuGraphLaunch(window_graph, d.stream));
                    l.enqueued = 1;
                } else {
                    DREX(drex_gather(e, &arena));
                }
            }
            DREX(drex_ramp(e, &l, where.data(), verdicts[on].data(), rows));
            if (on && graphs) {
                DREX(drex_fill_plan(e));
                CU(cuGraphLaunch(fill_graph, d.stream));
            } else {
                DREX(drex_fill(e));
            }
            if (on) {
                d.wait();
                const auto dense = dense_memory.read<char>(arena_bytes.size());
                bool good = true;
                for (uint32_t i = 0; i < rows; i++) {
                    good &= memcmp(&dense[i * hidden], &arena_bytes[planned[i].slot * hidden], hidden) == 0;
                }
                check(good, name + ": gathered rows");
            }
            drex_completion done = DREX_COMPLETION_INITIALIZER;
            done.now_ns = step * 10 + 2;
            DREX(drex_complete(e, &done));
            DREX(drex_plan(e, &in, planned.data(), rows, &out));
            if (out.n_rows) {
                DREX(drex_complete(e, &done));
            }
        }
        for (uint32_t i = 0; i < rows; i++) {
            const drex_verdict &a = verdicts[0][i], &b = verdicts[1][i];
            check(a.decision == b.decision && a.token == b.token && fabsf(a.confidence - b.confidence) < 3e-6f,
                  name + ", step " + std::to_string(step) + " row " + std::to_string(i));
        }
    }
    d.wait();
    bool good = true;
    for (size_t i = 0; i < on_host.size(); i++) {
        good &= on_device[i].read<char>(on_host[i].size()) == on_host[i];
    }
    check(good, name + ": K/V");
    if (graphs) {
        CU(cuGraphExecDestroy(window_graph));
        CU(cuGraphExecDestroy(fill_graph));
    }
    DREX(drex_destroy(engines[0]));
    DREX(drex_destroy(engines[1]));
}

int test(const Device & d, bool small) {
    const std::vector<uint32_t> lengths =
        small ? std::vector<uint32_t>{1, 33, 8193} : std::vector<uint32_t>{1, 2, 33, 1000, 8191, 8192, 8193, 32000, 128256, 300000};
    for (const uint32_t n : lengths) {
        for (const Type type : {F32, F16, BF16}) {
            test_ramp(d, n, type, 0, true);
            test_ramp(d, n, type, 0, false);
            test_ramp(d, n, type, n % 2 ? 40 : 64, true);
        }
    }
    for (const uint32_t unit : {1u, 2u, 4u, 8u, 16u}) {
        for (const bool transposed : {false, true}) {
            test_fill(d, unit, 17, 5, transposed);
            test_fill(d, unit, 256, 256, transposed);
            test_fill(d, unit, 96, 0, transposed);
        }
    }
    // More than 224 rows do not fit into a launch.
    for (const bool graphs : {false, true}) {
        test_abi(d, 40, small ? 300 : 32000, graphs);
        test_abi(d, 300, 200, graphs);
    }
    printf("%d comparisons, %d failed\n", comparisons, failures);
    return failures != 0;
}

// Median of a launch's time in microseconds, as the device's own clock sees
// `inner` of them in a row.
template <typename F>
double time_us(const Device & d, int inner, F && launch) {
    CUevent a, b;
    CU(cuEventCreate(&a, 0));
    CU(cuEventCreate(&b, 0));
    for (int i = 0; i < inner; i++) {
        launch(i);
    }
    std::vector<double> times;
    for (int run = 0; run < 15; run++) {
        CU(cuEventRecord(a, d.stream));
        for (int i = 0; i < inner; i++) {
            launch(i);
        }
        CU(cuEventRecord(b, d.stream));
        CU(cuEventSynchronize(b));
        float ms = 0;
        CU(cuEventElapsedTime(&ms, a, b));
        times.push_back(ms * 1000.0 / inner);
    }
    CU(cuEventDestroy(a));
    CU(cuEventDestroy(b));
    std::nth_element(times.begin(), times.begin() + 7, times.end());
    return times[7];
}

std::string json;

void result(const char * what, const std::string & shape, double us, double bytes, double copy) {
    const double rate = bytes / us * 1e-3;  // GB/s
    printf("%-10s %-34s %9.2f us %8.3f MB %8.0f GB/s  %5.1f %% of copy\n", what, shape.c_str(), us, bytes * 1e-6, rate,
           rate / copy * 100);
    char line[400];
    snprintf(line, sizeof line,
             "%s\n    {\"what\": \"%s\", \"shape\": \"%s\", \"us\": %.3f, \"bytes\": %.0f, \"gb_per_s\": %.1f, \"share_of_copy\": %.4f}",
             json.empty() ? "" : ",", what, shape.c_str(), us, bytes, rate, rate / copy);
    json += line;
}

int bench(const Device & d, const char * path, bool small) {
    const size_t big = small ? 1 << 16 : size_t{1} << 30;
    const Memory from(big), to(big);
    CU(cuMemsetD8(from.at, 0, big));
    CU(cuCtxSynchronize());
    const double copy_us = time_us(d, 3, [&](int) { CU(cuMemcpyDtoDAsync(to.at, from.at, big, d.stream)); });
    const double copy = 2.0 * static_cast<double>(big) / copy_us * 1e-3;
    result("copy", "device to device", copy_us, 2.0 * static_cast<double>(big), copy);

    for (const uint32_t n : {32000u, 128256u}) {
        for (const uint32_t rows : {1u, 8u, 32u, 64u}) {
            for (const Type type : {F32, F16}) {
                for (const uint32_t top : {0u, 40u}) {
                    if (top && (rows != 32 || type != F32)) {
                        continue;
                    }
                    const size_t bytes = static_cast<size_t>(rows) * n * ELEMENT[type];
                    // So many places that no launch finds its logits in a cache.
                    const int places = static_cast<int>(std::max<size_t>(1, std::min<size_t>(2048, big / bytes)));
                    if (small && bytes > big) {
                        continue;
                    }
                    Ramp ramp(rows, n, top);
                    const double us = time_us(d, small ? 1 : std::max(places, 20), [&](int i) {
                        ramp.launch(d, type, from.at + static_cast<size_t>(i % places) * bytes / 16 * 16, n * ELEMENT[type], false);
                    });
                    result("ramp", std::to_string(rows) + " x " + std::to_string(n) + " " + TYPES[type] + (top ? " top 40" : ""), us,
                           static_cast<double>(bytes), copy);
                }
            }
        }
    }

    struct Cache {
        const char * name;
        uint32_t row_bytes;
    };
    const uint32_t cells = small ? 64 : 8192, layers = small ? 4 : 32;
    for (const Cache c : {Cache{"7B f16", 8192}, Cache{"8B f16", 2048}, Cache{"7B q8_0", 4352}, Cache{"8B q8_0", 1088}}) {
        if (small && c.row_bytes != 1088) {
            continue;
        }
        std::vector<Memory> memory;
        std::vector<DrexSide> sides;
        for (uint32_t i = 0; i < layers * 2; i++) {
            memory.emplace_back(static_cast<size_t>(cells) * c.row_bytes);
            sides.push_back({reinterpret_cast<void *>(memory.back().at), c.row_bytes});
        }
        const Memory table(sides.data(), sides.size() * sizeof(DrexSide));
        for (const uint32_t exit_layer : {layers / 4, layers / 2}) {
            for (const uint32_t holes : {1u, 4u, 8u, 16u, 32u, 64u, 200u}) {
                const uint32_t skipped = layers - exit_layer;
                DrexFillArgs a = {};
                a.sides = reinterpret_cast<const DrexSide *>(table.at);
                a.n_layers = layers;
                a.source = exit_layer - 1;
                a.shape[0] = a.shape[1] = {c.row_bytes / 16, 16, 0};
                a.cells.n = holes;
                // As src/device/cuda does.
                const uint64_t units = static_cast<uint64_t>(holes) * 2 * (c.row_bytes / 16);
                const uint64_t groups = std::max<uint64_t>(1, std::min<uint64_t>(skipped, ((1u << 17) + units - 1) / units));
                a.layers_a_block = static_cast<uint32_t>((skipped + groups - 1) / groups);
                const unsigned x = static_cast<unsigned>((units + DREX_COPY_THREADS - 1) / DREX_COPY_THREADS);
                const unsigned y = (skipped + a.layers_a_block - 1) / a.layers_a_block;
                const double us = time_us(d, small ? 1 : 40, [&](int i) {
                    for (uint32_t h = 0; h < holes; h++) {
                        a.cells.here[h] = (h * 37 + static_cast<uint32_t>(i) * 211) % cells;
                    }
                    d.launch(d.fill, x, y, DREX_COPY_THREADS, a);
                });
                result("fill", std::string(c.name) + ", " + std::to_string(holes) + " holes, " + std::to_string(skipped) + " layers", us,
                       2.0 * holes * c.row_bytes * (skipped + 1), copy);
            }
        }
    }
    if (path) {
        char name[256] = "?";
        int version = 0;
        CUdevice device;
        CU(cuCtxGetDevice(&device));
        CU(cuDeviceGetName(name, sizeof name, device));
        CU(cuDriverGetVersion(&version));
        std::ofstream(path) << "{\n  \"device\": \"" << name << "\",\n  \"driver\": " << version << ",\n  \"drex\": \"" << drex_version()
                            << "\",\n  \"results\": [" << json << "\n  ]\n}\n";
    }
    return 0;
}

}  // namespace

int main(int argc, char ** argv) {
    const bool is_test = argc == 3 && strcmp(argv[1], "test") == 0;
    const bool is_bench = (argc == 3 || argc == 4) && strcmp(argv[1], "bench") == 0;
    if (!is_test && !is_bench) {
        fprintf(stderr, "usage: gpu-kernels test IMAGE | gpu-kernels bench IMAGE [JSON]\n");
        return 2;
    }
    CU(cuInit(0));
    CUdevice device;
    CUcontext context;
    CU(cuDeviceGet(&device, 0));
    CU(cuDevicePrimaryCtxRetain(&context, device));
    CU(cuCtxSetCurrent(context));
    // Small shapes: on the driver without a device, and under a sanitizer.
    const char * small = getenv("DREX_GPU_SMALL");
    int status;
    {
        const Device d(argv[2]);
        status = is_test ? test(d, small && *small == '1') : bench(d, argc == 4 ? argv[3] : nullptr, small && *small == '1');
        CU(cuStreamDestroy(d.stream));
        CU(cuModuleUnload(d.module));
    }
    CU(cuDevicePrimaryCtxRelease(device));
    return status;
}
