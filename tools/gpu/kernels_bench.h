// SPDX-License-Identifier: Apache-2.0

// How near the kernels come to the memory's speed: in a row of launches, in a
// graph, from memory and from the cache, beside plain copies and reads.

#pragma once

#include "kernels.h"

namespace {

struct Bench {
    const Device & d;
    bool small;
    size_t big;
    Memory from, to;
    double copy = 0, read = 0;  // GB/s
    CUfunction probe = nullptr;
    int n_sm = 1;
    std::string json;

    Bench(const Device & d, bool small) : d(d), small(small), big(small ? 1 << 18 : size_t{1} << 30), from(big), to(big) {}

    // Median time of a launch in microseconds by the device's own clock, over
    // `inner` of them in a row.
    double time_us(const Device & on, int inner, const std::function<void()> & all) const {
        CUevent a, b;
        CU(cuEventCreate(&a, 0));
        CU(cuEventCreate(&b, 0));
        std::vector<double> times;
        const int runs = small ? 1 : 15;
        for (int run = -1; run < runs; run++) {
            CU(cuEventRecord(a, on.stream));
            all();
            CU(cuEventRecord(b, on.stream));
            CU(cuEventSynchronize(b));
            float ms = 0;
            CU(cuEventElapsedTime(&ms, a, b));
            if (run >= 0) {
                times.push_back(ms * 1000.0 / inner);
            }
        }
        CU(cuEventDestroy(a));
        CU(cuEventDestroy(b));
        std::sort(times.begin(), times.end());
        return times[times.size() / 2];
    }

    struct Row {
        std::string what, shape;
        double bytes;
        bool cold = true;    // nothing that it reads is in a cache
        bool brief = false;  // for the table at the end
        std::string image = "drex";
    };

    // launch(i) is one of `inner` launches, on memory of its own where the
    // times are to be those of the memory. Returns GB/s.
    double row(const Row & r, int inner, const std::function<void(int)> & launch, const Device * on = nullptr) {
        on = on ? on : &d;
        const auto all = [&] {
            for (int i = 0; i < inner; i++) {
                launch(i);
            }
        };
        const double us = time_us(*on, inner, all);
        const CUgraphExec graph = captured(*on, all);
        const double graph_us = time_us(*on, inner, [&] { CU(cuGraphLaunch(graph, on->stream)); });
        CU(cuGraphExecDestroy(graph));
        return add(r, us, graph_us);
    }

    double add(const Row & r, double us, double graph_us) {
        const double rate = r.bytes / us * 1e-3;
        char line[600], share[24] = "null", graph[24] = "null";
        if (read > 0) {
            snprintf(share, sizeof share, "%.4f", rate / read);
        }
        if (graph_us > 0) {
            snprintf(graph, sizeof graph, "%.3f", graph_us);
        }
        printf("%-8s %-6s %-36s %-5s %9.2f us, in a graph %9s us %10.3f MB %8.0f GB/s  %5.1f %% of a copy, of a read %s\n", r.what.c_str(),
               r.image.c_str(), r.shape.c_str(), r.cold ? "cold" : "warm", us, graph, r.bytes * 1e-6, rate, copy > 0 ? rate / copy * 100 : 100.0, share);
        snprintf(line, sizeof line,
                 "%s\n    {\"what\": \"%s\", \"image\": \"%s\", \"shape\": \"%s\", \"cold\": %s, \"brief\": %s, \"us\": %.3f, \"graph_us\": %s, "
                 "\"bytes\": %.0f, \"gb_per_s\": %.1f, \"share_of_copy\": %.4f, \"share_of_read\": %s}",
                 json.empty() ? "" : ",", r.what.c_str(), r.image.c_str(), r.shape.c_str(), r.cold ? "true" : "false", r.brief ? "true" : "false",
                 us, graph, r.bytes, rate, copy > 0 ? rate / copy : 1.0, share);
        json += line;
        return rate;
    }

    // So many places that no launch finds its memory in a cache, and enough
    // launches that their number does not matter.
    int places(size_t bytes) const { return static_cast<int>(std::max<size_t>(1, std::min<size_t>(1024, big / bytes))); }
    int launches(size_t bytes) const { return small ? 1 : std::max(20, std::min(places(bytes), 200)); }

    void baselines() {
        for (const size_t bytes : {size_t{1} << 30, size_t{1} << 27, size_t{16416768}, size_t{1} << 23, size_t{1} << 20, size_t{1} << 17}) {
            if (bytes > big) {
                continue;
            }
            const int n = places(bytes);
            // As much is moved as is read and written.
            const double rate = row({"copy", std::to_string(bytes) + " bytes", 2.0 * static_cast<double>(bytes), true, bytes > 1 << 24}, small ? 1 : std::max(3, n / 4),
                                    [&](int i) {
                                        const size_t at = static_cast<size_t>(i % n) * bytes;
                                        CU(cuMemcpyDtoDAsync(to.at + at, from.at + at, bytes, d.stream));
                                    });
            copy = std::max(copy, rate);
        }
        for (const size_t bytes : {size_t{1} << 30, size_t{16416768}}) {
            struct { CUdeviceptr from; uint64_t n; CUdeviceptr out; } a = {from.at, bytes / 16, to.at};
            for (const bool cold : {true, false}) {
                if (!probe || (bytes == big && !cold)) {
                    continue;
                }
                const int n = cold ? places(bytes) : 1;
                const double rate = row({"read", std::to_string(bytes) + " bytes", static_cast<double>(bytes), cold, true}, launches(bytes), [&](int i) {
                    a.from = from.at + static_cast<size_t>(i % n) * bytes;
                    d.launch(probe, static_cast<unsigned>(n_sm) * 8, 1, 256, a);
                });
                if (bytes == big) {
                    read = rate;
                }
            }
        }
    }

    // Random logits of a type, all over `from`.
    void logits(Type type) {
        const size_t part = std::min<size_t>(big, 1 << 25);
        std::vector<float> v(part / ELEMENT[type]);
        Random r(7);
        for (float & x : v) {
            x = r.unit() * 20;
        }
        std::vector<double> values;
        const auto stored = store(v, type, values);
        for (size_t at = 0; at < big; at += part) {
            CU(cuMemcpyHtoD(from.at + at, stored.data(), part));
        }
        CU(cuCtxSynchronize());
    }

    void ramp(const Device & on, Type type, uint32_t rows, uint32_t n, uint32_t top, bool aligned, bool cold) {
        const size_t element = ELEMENT[type], stride = n * element, bytes = rows * stride;
        if (bytes + 16 > big) {
            return;
        }
        Ramp r(on, rows, n, top);
        const size_t place = (bytes + 15) / 16 * 16;
        const int count = cold ? places(place + 16) : 1;
        row({"ramp", std::to_string(rows) + " x " + std::to_string(n) + " " + TYPES[type] + (top ? " top " + std::to_string(top) : "") + (aligned ? "" : " odd"),
             static_cast<double>(bytes), cold, rows == 32 && type == F32, on.name},
            launches(bytes), [&](int i) { r.launch(type, from.at + static_cast<size_t>(i % count) * place + (aligned ? 0 : element), stride, false); }, &on);
    }

    // What the host waits for: a launch, a copy of a few bytes, their end.
    void seen_by_the_host(uint32_t rows, uint32_t n) {
        if (static_cast<size_t>(rows) * n * 4 > big) {
            return;
        }
        Ramp r(d, rows, n, 0);
        void * host;
        CU(cuMemHostAlloc(&host, rows * sizeof(DrexMoments), 0));
        std::vector<double> times;
        for (int i = 0; i < (small ? 2 : 200); i++) {
            const auto begin = std::chrono::steady_clock::now();
            r.launch(F32, from.at, n * 4, false);
            CU(cuMemcpyDtoHAsync(host, r.out.at, rows * sizeof(DrexMoments), d.stream));
            d.wait();
            times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
        }
        CU(cuMemFreeHost(host));
        std::sort(times.begin(), times.end());
        add({"ramp", std::to_string(rows) + " x " + std::to_string(n) + " f32, launch + copy + wait", static_cast<double>(rows) * n * 4, false, true, "host"},
            times[times.size() / 2], 0);
    }

    void fills() {
        struct Cache {
            const char * name;
            uint32_t row_bytes, unit;
            bool transposed;
        };
        const Cache caches[] = {{"7B f16", 8192, 16, false}, {"8B f16", 2048, 16, false}, {"7B q8_0", 4352, 16, false}, {"8B q8_0", 1088, 16, false},
                                {"8B q8_0 odd", 1088, 2, false}, {"8B f16 transposed", 2048, 2, true}};
        const uint32_t cells = small ? 64 : 8192, layers = small ? 4 : 32;
        for (const Cache & c : caches) {
            if (small && c.row_bytes != 1088) {
                continue;
            }
            std::vector<Memory> memory;
            std::vector<DrexSide> sides;
            for (uint32_t i = 0; i < layers * 2; i++) {
                memory.emplace_back(static_cast<size_t>(cells) * c.row_bytes);
                const bool turned = c.transposed && i % 2;
                sides.push_back({reinterpret_cast<void *>(memory.back().at), turned ? cells * c.unit : c.row_bytes});
            }
            const Memory table(sides.data(), sides.size() * sizeof(DrexSide));
            for (const uint32_t exit_layer : {layers / 4, layers / 2}) {
                for (const uint32_t holes : {1u, 4u, 8u, 16u, 32u, 64u, 200u}) {
                    if (small && holes > 64) {
                        continue;
                    }
                    fill(c.name, c.row_bytes, c.unit, c.transposed, cells, layers, exit_layer, holes, 0, table);
                    // As in a graph over batches of up to 64 rows.
                    if (c.unit == 16 && holes <= 64) {
                        fill(c.name, c.row_bytes, c.unit, c.transposed, cells, layers, exit_layer, holes, 64, table);
                    }
                }
            }
        }
    }

    void fill(const std::string & name, uint32_t row_bytes, uint32_t unit, bool transposed, uint32_t cells, uint32_t layers, uint32_t exit_layer,
              uint32_t holes, uint32_t most, const Memory & table) {
        const uint32_t skipped = layers - exit_layer;
        DrexFillArgs a = {};
        a.sides = reinterpret_cast<const DrexSide *>(table.at);
        a.n_layers = layers;
        a.source = exit_layer - 1;
        // As src/device/cuda does, here and below.
        a.busy = 1 << 17;
        a.shape[0] = {row_bytes / (transposed ? 16 : unit), transposed ? 16 : unit, 0};
        a.shape[1] = {row_bytes / unit, unit, transposed};
        std::vector<uint32_t> numbers(holes);
        const auto put = [&](int i) {
            for (uint32_t h = 0; h < holes; h++) {
                numbers[h] = (h * 37 + static_cast<uint32_t>(i) * 211) % cells;
            }
        };
        put(0);
        const Numbers list(numbers, most > 0, a.source);
        a.cells = list.rows;
        const uint32_t units = (most ? most : holes) * (a.shape[0].n + a.shape[1].n);
        const uint32_t groups = (skipped - 1) / drex_layers_a_turn(units, skipped, a.busy) + 1;
        const uint64_t wide = (units + DREX_COPY_THREADS - 1) / DREX_COPY_THREADS;
        const uint64_t fewer = std::min<uint64_t>(2 * a.busy / DREX_COPY_THREADS, wide * skipped);
        const uint64_t blocks = most ? std::max(wide * groups, fewer) : wide * groups;
        // A list is read when its launch runs, so all launches have the same.
        row({"fill", name + (most ? " listed" : "") + ", " + std::to_string(holes) + " holes, " + std::to_string(skipped) + " layers",
             2.0 * holes * row_bytes * (skipped + 1), most == 0, name == "7B f16" && skipped == layers - layers / 4},
            small ? 1 : 40, [&](int i) {
                if (!most) {
                    put(i);
                    std::copy(numbers.begin(), numbers.end(), a.cells.here);
                }
                d.launch(d.fill, static_cast<unsigned>(std::min<uint64_t>(blocks, 1 << 16)), 1, DREX_COPY_THREADS, a);
            });
    }

    void rows_of_the_arena() {
        const uint32_t row_bytes = 16384, slots = static_cast<uint32_t>(big / 2 / row_bytes);
        for (const uint32_t n : {8u, 64u}) {
            for (const bool to_arena : {false, true}) {
                for (const bool listed : {false, true}) {
                    std::vector<uint32_t> numbers(n);
                    for (uint32_t i = 0; i < n; i++) {
                        numbers[i] = i * 5 % slots;
                    }
                    const Numbers list(numbers, listed, 0);
                    DrexCopyRowsArgs a = {};
                    a.arena = reinterpret_cast<char *>(from.at);
                    a.dense = reinterpret_cast<char *>(to.at);
                    a.arena_stride = a.dense_stride = row_bytes;
                    a.n_units = row_bytes / 16;
                    a.unit = 16;
                    a.to_arena = to_arena;
                    a.rows = list.rows;
                    if (static_cast<size_t>(n) * row_bytes > big) {
                        continue;
                    }
                    // The window before has just written them: from the cache.
                    row({to_arena ? "scatter" : "gather", std::to_string(n) + " x 16 kB" + (listed ? " listed" : ""), 2.0 * n * row_bytes, false},
                        small ? 1 : 40, [&](int) { d.launch(d.copy_rows, n * row_bytes / 16 / DREX_COPY_THREADS, 1, DREX_COPY_THREADS, a); });
                }
            }
        }
    }

    void all(const std::vector<std::unique_ptr<Device>> & others) {
        baselines();
        for (const Type type : {F16, BF16, F32}) {
            logits(type);
            for (const uint32_t n : {32000u, 128256u}) {
                for (const uint32_t rows : {1u, 8u, 32u, 64u}) {
                    ramp(d, type, rows, n, 0, true, true);
                }
                ramp(d, type, 32, n, 0, true, false);
                ramp(d, type, 32, n + 1, 0, false, true);
                ramp(d, type, 32, n, 40, true, true);
                ramp(d, type, 32, n, 64, true, true);
            }
            for (const auto & other : others) {
                for (const uint32_t n : {32000u, 128256u}) {
                    for (const uint32_t rows : {8u, 32u}) {
                        ramp(*other, type, rows, n, 0, true, true);
                    }
                }
            }
        }
        if (small) {
            ramp(d, F32, 2, 9000, 0, true, true);
            ramp(d, F32, 1, 9000, 40, false, false);
        }
        for (const uint32_t n : {32000u, 128256u}) {
            for (const uint32_t rows : {8u, 32u}) {
                seen_by_the_host(rows, n);
            }
        }
        rows_of_the_arena();
        fills();
    }

    void write(const char * path) const {
        char name[256] = "?";
        int version = 0;
        CUdevice device;
        CU(cuCtxGetDevice(&device));
        CU(cuDeviceGetName(name, sizeof name, device));
        CU(cuDriverGetVersion(&version));
        char rates[120];
        snprintf(rates, sizeof rates, "  \"copy_gb_per_s\": %.1f,\n  \"read_gb_per_s\": ", copy);
        std::ofstream(path) << "{\n  \"device\": \"" << name << "\",\n  \"driver\": " << version << ",\n  \"drex\": \"" << drex_version() << "\",\n"
                            << rates << (read > 0 ? std::to_string(read) : "null") << ",\n  \"results\": [" << json << "\n  ]\n}\n";
    }
};

// OTHER is probe=IMAGE or CHUNKxTHREADS=IMAGE.
int bench(const Device & d, const char * path, int n_others, char ** others, bool small) {
    Bench b(d, small);
    CUdevice device;
    CU(cuCtxGetDevice(&device));
    CU(cuDeviceGetAttribute(&b.n_sm, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device));
    std::vector<std::unique_ptr<Device>> images;
    for (int i = 0; i < n_others; i++) {
        const std::string other = others[i];
        const size_t equals = other.find('=');
        if (equals == std::string::npos) {
            fprintf(stderr, "%s: neither probe=IMAGE nor CHUNKxTHREADS=IMAGE\n", others[i]);
            return 2;
        }
        if (other.compare(0, equals, "probe") == 0) {
            CUmodule module;
            CU(cuModuleLoad(&module, others[i] + equals + 1));
            CU(cuModuleGetFunction(&b.probe, module, "drex_probe_read"));
        } else {
            images.push_back(std::make_unique<Device>(others[i] + equals + 1, other.substr(0, equals)));
        }
    }
    b.all(images);
    b.write(path);
    return 0;
}

}  // namespace
