// SPDX-License-Identifier: Apache-2.0

// Runs the kernels' own source on a CPU, and says how their arguments are laid
// out.

#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include "../drex.cu"

dim3_on_host threadIdx, blockIdx, gridDim;

namespace {

constexpr uint32_t MAX_THREADS = 256;
constexpr size_t STACK = 64 * 1024;

struct Thread {
    jmp_buf context;  // as ucontext, without a system call a switch
    bool made;
    uint32_t reached[2];  // barriers of the block, of the warp
    uint32_t shuffles;
    bool done;
};

Thread threads[MAX_THREADS];
uint32_t n_threads, running;
bool backwards;
bool misaligned;
jmp_buf scheduler;
uint32_t lanes[2][MAX_THREADS];
void (*kernel)(const void *);
const void * kernel_args;

void yield() {
    if (_setjmp(threads[running].context) == 0) {
        _longjmp(scheduler, 1);
    }
}

// A fibre lives as long as the program, and runs one thread after another.
void run() {
    for (;;) {
        kernel(kernel_args);
        threads[running].done = true;
        yield();
    }
}

void resume(uint32_t t) {
    running = t;
    threadIdx = {t, 0, 0};
    if (_setjmp(scheduler) != 0) {
        return;
    }
    Thread & f = threads[t];
    if (f.made) {
        _longjmp(f.context, 1);
    }
    f.made = true;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = malloc(STACK);
    first.uc_stack.ss_size = STACK;
    first.uc_link = nullptr;
    makecontext(&first, run, 0);
    setcontext(&first);
}

void block() {
    for (uint32_t t = 0; t < n_threads; t++) {
        Thread & f = threads[t];
        f.reached[0] = f.reached[1] = f.shuffles = 0;
        f.done = false;
    }
    for (uint32_t left = n_threads; left > 0;) {
        for (uint32_t i = 0; i < n_threads; i++) {
            const uint32_t t = backwards ? n_threads - 1 - i : i;
            if (!threads[t].done) {
                resume(t);
                left -= threads[t].done;
            }
        }
    }
}

template <typename Args, void (*F)(Args)>
void enter(const void * args) {
    F(*static_cast<const Args *>(args));
}

struct Entry {
    const char * name;
    void (*run)(const void *);
};

const Entry ENTRIES[] = {
    {"drex_ramp_f32", enter<const DrexRampArgs, drex_ramp_f32>},
    {"drex_ramp_f16", enter<const DrexRampArgs, drex_ramp_f16>},
    {"drex_ramp_bf16", enter<const DrexRampArgs, drex_ramp_bf16>},
    {"drex_ramp_top_f32", enter<const DrexRampArgs, drex_ramp_top_f32>},
    {"drex_ramp_top_f16", enter<const DrexRampArgs, drex_ramp_top_f16>},
    {"drex_ramp_top_bf16", enter<const DrexRampArgs, drex_ramp_top_bf16>},
    {"drex_state_copy", enter<const DrexFillArgs, drex_state_copy>},
    {"drex_copy_rows", enter<const DrexCopyRowsArgs, drex_copy_rows>},
};

}  // namespace

// Waits for the threads [first, first + n) of this block: all of it, or a warp.
void drex_host_barrier(uint32_t first, uint32_t n) {
    const int kind = n == 32;
    const uint32_t self = running, me = ++threads[self].reached[kind];
    for (uint32_t turns = 0;; turns++) {
        yield();
        uint32_t t = first;
        while (t < first + n && t < n_threads && threads[t].reached[kind] >= me) {
            t++;
        }
        if (t == first + n || t == n_threads) {
            return;
        }
        if (threads[t].done || turns > 1000000) {
            fprintf(stderr, "thread %u waits at a barrier that thread %u does not reach\n", self, t);
            abort();
        }
    }
}

void drex_host_misaligned(const void * p, size_t alignment) {
    if (!misaligned) {
        fprintf(stderr, "thread %u of block %u accesses %p, which is not aligned to %zu\n", running, blockIdx.x, p, alignment);
    }
    misaligned = true;
}

// What the lanes of this thread's warp hand in, and where it begins.
static const uint32_t * exchange(uint32_t bits) {
    const uint32_t self = running;
    // Two sides in turn: the lanes read one while the next is written.
    uint32_t * side = lanes[threads[self].shuffles++ % 2];
    side[self] = bits;
    __syncwarp();
    return side + self / 32 * 32;
}

uint32_t drex_host_shuffle(uint32_t bits, int mask) {
    const uint32_t lane = running % 32;
    return exchange(bits)[lane ^ static_cast<uint32_t>(mask)];
}

uint32_t __reduce_max_sync(uint32_t, uint32_t v) {
    const uint32_t * all = exchange(v);
    for (int i = 0; i < 32; i++) {
        v = max(v, all[i]);
    }
    return v;
}

uint32_t __ballot_sync(uint32_t, bool on) {
    const uint32_t * all = exchange(on);
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) {
        bits |= all[i] << i;
    }
    return bits;
}

// 0; -1 for a kernel that does not exist; -2 for one that accessed memory that
// was not aligned for it.
extern "C" int drex_emulate(const char * name, uint32_t grid_x, uint32_t grid_y, uint32_t n, const void * args,
                            int turned) {
    for (const Entry & e : ENTRIES) {
        if (strcmp(e.name, name) == 0) {
            kernel = e.run;
            kernel_args = args;
            n_threads = n;
            backwards = turned;
            misaligned = false;
            gridDim = {grid_x, grid_y, 1};
            const uint64_t blocks = static_cast<uint64_t>(grid_x) * grid_y;
            for (uint64_t i = 0; i < blocks; i++) {
                const uint64_t b = backwards ? blocks - 1 - i : i;
                blockIdx = {static_cast<uint32_t>(b % grid_x), static_cast<uint32_t>(b / grid_x), 0};
                block();
            }
            return misaligned ? -2 : 0;
        }
    }
    return -1;
}

extern "C" uint32_t drex_layers(uint32_t units, uint32_t targets, uint32_t busy) {
    return drex_layers_a_turn(units, targets, busy);
}

// What the kernels take, for the side that fills it in: sizes and offsets.
extern "C" const char * drex_layouts() {
    static char text[2048];
    size_t n = 0;
#define SIZE(T) n += snprintf(text + n, sizeof text - n, #T " %zu\n", sizeof(T));
#define AT(T, f) n += snprintf(text + n, sizeof text - n, #T "." #f " %zu\n", offsetof(T, f));
    SIZE(DrexMoments)
    SIZE(DrexTop)
    SIZE(DrexRampArgs)
    AT(DrexRampArgs, n_rows)
    AT(DrexRampArgs, n_top)
    AT(DrexRampArgs, partial)
    AT(DrexRampArgs, out_top)
    SIZE(DrexRows)
    AT(DrexRows, here)
    SIZE(DrexSide)
    SIZE(DrexShape)
    SIZE(DrexFillArgs)
    AT(DrexFillArgs, shape)
    AT(DrexFillArgs, cells)
    SIZE(DrexCopyRowsArgs)
    AT(DrexCopyRowsArgs, rows)
    return text;
}
