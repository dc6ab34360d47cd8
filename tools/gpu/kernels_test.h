// SPDX-License-Identifier: Apache-2.0

// The kernels against references in f64 and naive copies, and the C ABI on the
// device against the C ABI on the host.

#pragma once

#include "kernels.h"

namespace {

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
    Ramp ramp(d, n_rows, n, top);
    // Twice: the counters must be left as they were.
    for (int i = 0; i < 2; i++) {
        ramp.launch(type, logits.at + offset, stride, true);
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

std::vector<char> noise(size_t bytes, uint64_t seed) {
    std::vector<char> v(bytes);
    Random r(seed);
    for (char & b : v) {
        b = static_cast<char>(r.next() >> 32);
    }
    return v;
}

struct FillCase {
    uint32_t unit, k_units, v_units, source, busy;
    bool transposed, listed;
};

void test_fill(const Device & d, const FillCase & c) {
    const uint32_t layers = 7, cells = 40, unit = c.unit, pad = unit * 3;
    const size_t k_stride = c.k_units * unit + pad, v_stride = (c.transposed ? cells : c.v_units) * unit + pad;
    const size_t sizes[2] = {cells * k_stride, (c.transposed ? c.v_units : cells) * v_stride};
    std::vector<Memory> memory;
    std::vector<std::vector<char>> want;
    std::vector<DrexSide> sides;
    for (uint32_t l = 0; l < layers; l++) {
        for (int s = 0; s < 2; s++) {
            want.push_back(noise(std::max<size_t>(sizes[s], 1), l * 2 + static_cast<uint64_t>(s) + 1));
            memory.emplace_back(want.back().data(), want.back().size());
            sides.push_back({reinterpret_cast<void *>(memory.back().at), s ? v_stride : k_stride});
        }
    }
    const std::vector<uint32_t> holes = {3, 39, 0, 17, 18, 19};
    const Numbers numbers(holes, c.listed, c.source);
    const Memory table(sides.data(), sides.size() * sizeof(DrexSide));
    DrexFillArgs a = {};
    a.sides = reinterpret_cast<const DrexSide *>(table.at);
    a.n_layers = layers;
    // In a list, the source is the list's.
    a.source = c.listed ? 0 : c.source;
    a.busy = c.busy;
    a.shape[0] = {c.k_units, unit, 0};
    a.shape[1] = {c.v_units, unit, c.transposed};
    a.cells = numbers.rows;
    // Fewer threads than units, and blocks without any.
    d.launch(d.fill, c.listed ? 11 : 2, 1, DREX_COPY_THREADS, a);
    d.wait();
    for (uint32_t l = c.source + 1; l < layers; l++) {
        for (const uint32_t cell : holes) {
            memcpy(&want[l * 2][cell * k_stride], &want[c.source * 2][cell * k_stride], c.k_units * unit);
            for (uint32_t j = 0; j < c.v_units; j++) {
                const size_t at = c.transposed ? j * v_stride + cell * unit : cell * v_stride + j * unit;
                memcpy(&want[l * 2 + 1][at], &want[c.source * 2 + 1][at], unit);
            }
        }
    }
    bool good = true;
    for (size_t i = 0; i < want.size(); i++) {
        good &= memory[i].read<char>(want[i].size()) == want[i];
    }
    check(good, "fill, units of " + std::to_string(unit) + (c.transposed ? ", transposed" : "") + (c.listed ? ", listed" : ""));
}

void test_copy_rows(const Device & d, uint32_t unit, uint32_t n_units, bool to_arena, bool listed) {
    const size_t row = unit * n_units, arena_stride = row + unit, dense_stride = row + 2 * unit;
    const std::vector<uint32_t> slots = {6, 0, 3, 9};
    std::vector<char> arena = noise(10 * arena_stride, 1), dense = noise(4 * dense_stride, 99);
    const Memory arena_memory(arena.data(), arena.size()), dense_memory(dense.data(), dense.size());
    const Numbers numbers(slots, listed, 0);
    DrexCopyRowsArgs a = {};
    a.arena = reinterpret_cast<char *>(arena_memory.at);
    a.dense = reinterpret_cast<char *>(dense_memory.at);
    a.arena_stride = arena_stride;
    a.dense_stride = dense_stride;
    a.n_units = n_units;
    a.unit = unit;
    a.to_arena = to_arena;
    a.rows = numbers.rows;
    d.launch(d.copy_rows, 2, 1, DREX_COPY_THREADS, a);
    d.wait();
    for (size_t i = 0; i < slots.size(); i++) {
        char * x = &arena[slots[i] * arena_stride], * y = &dense[i * dense_stride];
        memcpy(to_arena ? x : y, to_arena ? y : x, row);
    }
    check(arena_memory.read<char>(arena.size()) == arena && dense_memory.read<char>(dense.size()) == dense,
          std::string("rows ") + (to_arena ? "to" : "from") + " the arena, units of " + std::to_string(unit));
}

// Which block ends a row, and when, is another one each time. The bits are not.
void test_repeated(const Device & d, int launches) {
    const uint32_t rows = 8, n = 20 * DREX_RAMP_CHUNK + 17, top = 8;
    std::vector<Memory> logits;
    for (uint64_t seed : {1, 2}) {
        std::vector<float> v(static_cast<size_t>(rows) * n);
        Random r(seed);
        for (float & x : v) {
            x = r.unit() * 20;
        }
        logits.emplace_back(v.data(), v.size() * 4);
    }
    Ramp ramp(d, rows, n, top);
    std::vector<char> first[2];
    int differ = 0;
    for (int i = 0; i < launches; i++) {
        // In turn, so that what a launch leaves behind is wrong for the next.
        ramp.launch(F32, logits[i % 2].at, n * 4, true);
        d.wait();
        auto found = ramp.out.read<char>(ramp.out.bytes);
        const auto tops = ramp.out_top.read<char>(ramp.out_top.bytes);
        found.insert(found.end(), tops.begin(), tops.end());
        if (i < 2) {
            first[i] = found;
        }
        differ += found != first[i % 2];
    }
    check(differ == 0, std::to_string(differ) + " of " + std::to_string(launches) + " launches over the same rows differ");
}

// The same requests on the device and on the host; with `graphs`, the device's
// work is captured in the first step and launched again in all others.
void test_abi(const Device & d, uint32_t rows, uint32_t n, Type type, bool graphs) {
    const uint32_t layers = 6, ramp_layer = 2, row_bytes = 4096, cells = rows + 24, hidden = 512, top = 3;
    const std::string name = std::string("C ABI") + (graphs ? ", graphs" : "") + ", " + std::to_string(rows) + " rows of " + TYPES[type];
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
        c.n_top = top;
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
    const Memory device(static_cast<size_t>(rows) * n * ELEMENT[type]);
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
        std::vector<double> values;
        const auto stored = store(logits, type, values);
        CU(cuMemcpyHtoD(device.at, stored.data(), stored.size()));
        CU(cuCtxSynchronize());
        std::vector<drex_verdict> verdicts[2];
        std::vector<drex_top> tops[2];
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
            l.dtype = DTYPES[type];
            l.data = on ? reinterpret_cast<const void *>(device.at) : stored.data();
            l.row_stride_bytes = n * ELEMENT[type];
            l.n_rows = out.n_rows;
            l.n_vocab = n;
            l.n_top = top;
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
            for (uint32_t i = 0; i < rows; i++) {
                uint32_t n_found = 0;
                tops[on].resize(rows * top);
                DREX(drex_top_get(e, i, &tops[on][i * top], top, &n_found));
                check(n_found == top, name + ": so many of the greatest");
            }
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
                // And back, from rows that are new.
                const auto fresh = noise(arena_bytes.size(), step + 50);
                CU(cuMemcpyHtoD(dense_memory.at, fresh.data(), fresh.size()));
                CU(cuCtxSynchronize());
                DREX(drex_scatter(e, &arena));
                d.wait();
                for (uint32_t i = 0; i < rows; i++) {
                    memcpy(&arena_bytes[planned[i].slot * hidden], &fresh[i * hidden], hidden);
                }
                check(arena_memory.read<char>(arena_bytes.size()) == arena_bytes, name + ": scattered rows");
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
            for (uint32_t k = i * top; k < (i + 1) * top; k++) {
                check(tops[0][k].token == tops[1][k].token && tops[0][k].logit == tops[1][k].logit, name + ": the greatest");
            }
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
    auto lengths = small ? std::vector<uint32_t>{1, 33, 8193} : cases("lengths");
    const auto longer = small ? std::vector<uint32_t>{} : cases("long_lengths");
    lengths.insert(lengths.end(), longer.begin(), longer.end());
    for (const uint32_t n : lengths) {
        for (const Type type : {F32, F16, BF16}) {
            test_ramp(d, n, type, 0, true);
            test_ramp(d, n, type, 0, false);
            test_ramp(d, n, type, n % 2 ? 40 : 64, true);
            test_ramp(d, n, type, 7, false);
        }
    }
    const auto shapes = cases("fill_shapes"), spreads = cases("fill_spreads");
    for (const uint32_t unit : cases("units")) {
        for (const bool listed : {false, true}) {
            for (const bool other : {false, true}) {
                for (size_t i = 0; i < shapes.size(); i += 2) {
                    for (size_t j = 0; j < spreads.size(); j += 2) {
                        test_fill(d, {unit, shapes[i], shapes[i + 1], spreads[j], spreads[j + 1], other, listed});
                    }
                }
                for (const uint32_t n_units : cases("row_units")) {
                    test_copy_rows(d, unit, n_units, other, listed);
                }
            }
        }
    }
    test_repeated(d, small ? 20 : 2000);
    for (const bool graphs : {false, true}) {
        for (const Type type : {F32, F16, BF16}) {
            test_abi(d, 40, small ? 300 : 32000, type, graphs);
        }
        // More than 224 rows, and more than 224 holes, do not fit into a launch.
        test_abi(d, 400, 200, F32, graphs);
    }
    printf("%d comparisons, %d failed\n", comparisons, failures);
    return failures != 0;
}

}  // namespace
