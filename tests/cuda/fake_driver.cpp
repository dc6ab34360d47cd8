// SPDX-License-Identifier: Apache-2.0

// A CUDA driver without a device. Memory is the host's, in blocks that are
// checked; kernels are their own source, run on the CPU. Work on a stream waits
// until somebody waits for the stream, as it may on a device, so a call that
// reads a result too early, or writes what a launch has yet to read, is seen.
//
// drex_fake_fail_at(n) makes the n-th call from now fail, drex_fake_fail_call()
// the next one of that name. drex_fake_errors() tells of what a program must
// not do.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "../../kernels/args.h"

extern "C" int drex_emulate(const char *, uint32_t, uint32_t, uint32_t, const void *, int);

namespace {

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
};

struct Work {
    std::string kernel;  // empty: a copy, from `args` if `from` is none
    std::vector<char> args;
    uint32_t grid_x, grid_y, threads;
    void * to;
    const void * from;
    size_t bytes;
};

struct Stream {
    std::deque<Work> work;
    bool capturing = false;
    std::vector<Work> captured;
};

struct Event {
    Stream * stream = nullptr;
    size_t position = 0;
};

thread_local std::vector<void *> contexts;
int64_t fail_at = -1, calls = 0;
std::string errors, fail_call;
std::map<uintptr_t, size_t> device, pinned;
std::set<void *> modules, events;
std::map<void *, Stream> streams;
std::set<std::string> functions;
int order = 0;
// What the next loads of images come to.
std::deque<int> image_codes;

int call(const char * name) {
    calls++;
    if (fail_call == name) {
        fail_call.clear();
        return OUT_OF_MEMORY;
    }
    return fail_at >= 0 && calls > fail_at ? (fail_at = -1, OUT_OF_MEMORY) : SUCCESS;
}

int needs_context() { return contexts.empty() || !contexts.back() ? INVALID_CONTEXT : SUCCESS; }

void complain(const std::string & text) { errors += text + "\n"; }

// What a device refuses while any stream is being captured.
void not_in_a_capture(const char * name) {
    for (const auto & s : streams) {
        if (s.second.capturing) {
            complain(std::string(name) + " while a stream is being captured");
        }
    }
}

bool inside(const std::map<uintptr_t, size_t> & blocks, const void * p, size_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    auto it = blocks.upper_bound(at);
    if (it == blocks.begin()) {
        return false;
    }
    --it;
    return at + bytes <= it->first + it->second;
}

size_t args_size(const std::string & kernel) {
    if (kernel == "drex_state_copy") {
        return sizeof(DrexFillArgs);
    }
    return kernel == "drex_copy_rows" ? sizeof(DrexCopyRowsArgs) : sizeof(DrexRampArgs);
}

void run(const Work & w) {
    if (w.kernel.empty()) {
        memcpy(w.to, w.from ? w.from : w.args.data(), w.bytes);
    } else {
        if (drex_emulate(w.kernel.c_str(), w.grid_x, w.grid_y, w.threads, w.args.data(), order) != 0) {
            complain(w.kernel + " accesses memory that is not aligned for it");
        }
    }
}

void drain(Stream & s) {
    while (!s.work.empty()) {
        run(s.work.front());
        s.work.pop_front();
    }
}

int enqueue(void * stream, Work w) {
    Stream & s = streams[stream];
    if (s.capturing) {
        s.captured.push_back(std::move(w));
    } else {
        s.work.push_back(std::move(w));
    }
    return SUCCESS;
}

}  // namespace

#define ENTER(name)               \
    if (int e = call(name)) {     \
        return e;                 \
    }
#define ENTER_IN_CONTEXT(name)    \
    ENTER(name)                   \
    if (int e = needs_context()) {\
        complain(std::string(name) + " without a context"); \
        return e;                 \
    }

extern "C" {

// What a test asks of it.
void drex_fake_context(void * c) {
    contexts.clear();
    if (c) {
        contexts.push_back(c);
    }
}
size_t drex_fake_depth() { return contexts.size(); }
void drex_fake_fail_at(int64_t n) {
    fail_at = n;
    calls = 0;
}
void drex_fake_fail_call(const char * name) { fail_call = name; }
size_t drex_fake_armed() { return fail_at >= 0; }
int64_t drex_fake_calls() { return calls; }
void drex_fake_order(int o) { order = o; }
const char * drex_fake_errors() { return errors.c_str(); }
// What is alive: memory, modules, events.
size_t drex_fake_alive() { return device.size() + pinned.size() + modules.size() + events.size(); }
size_t drex_fake_pending(void * stream) { return streams[stream].work.size(); }
void * drex_fake_alloc(size_t bytes) {
    void * p = aligned_alloc(256, (bytes + 255) / 256 * 256 + 256);
    device[reinterpret_cast<uintptr_t>(p)] = bytes;
    return p;
}
void drex_fake_free(void * p) {
    device.erase(reinterpret_cast<uintptr_t>(p));
    free(p);
}
// Of what was captured before, nothing is left.
void drex_fake_capture(void * stream, int on) {
    streams[stream].capturing = on;
    if (on) {
        streams[stream].captured.clear();
    }
}
// The next image that is loaded comes to this.
void drex_fake_image(int code) { image_codes.push_back(code); }
// What is alive is nobody's any more.
void drex_fake_leak() {
    device.clear();
    pinned.clear();
    modules.clear();
    events.clear();
}
void * drex_fake_current() { return contexts.empty() ? nullptr : contexts.back(); }
void drex_fake_launch(void * stream) {
    for (const Work & w : streams[stream].captured) {
        streams[stream].work.push_back(w);
    }
}
void drex_fake_wait(void * stream) { drain(streams[stream]); }

// The driver. Texts and contexts never fail, as they have no device to ask.
int cuGetErrorName(int code, const char ** text) {
    *text = code == OUT_OF_MEMORY        ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == INVALID_CONTEXT    ? "CUDA_ERROR_INVALID_CONTEXT"
            : code == NO_BINARY_FOR_GPU  ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
                                         : "CUDA_ERROR_OTHER";
    return SUCCESS;
}
int cuGetErrorString(int code, const char ** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : "some other error";
    return SUCCESS;
}
int cuCtxGetCurrent(void ** context) {
    ENTER("cuCtxGetCurrent")
    *context = contexts.empty() ? nullptr : contexts.back();
    return SUCCESS;
}
int cuCtxPushCurrent_v2(void * context) {
    ENTER("cuCtxPushCurrent")
    contexts.push_back(context);
    return SUCCESS;
}
int cuCtxPopCurrent_v2(void ** context) {
    // Nobody could do anything about it.
    calls++;
    if (contexts.empty()) {
        complain("pop of no context");
        return INVALID_CONTEXT;
    }
    *context = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}
int cuModuleLoadData(void ** module, const void * image) {
    ENTER_IN_CONTEXT("cuModuleLoadData")
    not_in_a_capture("cuModuleLoadData");
    // A fatbin's magic number.
    uint32_t magic;
    memcpy(&magic, image, 4);
    if (magic != 0xba55ed50) {
        complain("not a fatbin");
        return INVALID_VALUE;
    }
    if (reinterpret_cast<uintptr_t>(image) % 16) {
        complain("an image that is not aligned");
    }
    if (!image_codes.empty()) {
        const int code = image_codes.front();
        image_codes.pop_front();
        if (code != SUCCESS) {
            return code;
        }
    }
    *module = malloc(1);
    modules.insert(*module);
    return SUCCESS;
}
int cuModuleUnload(void * module) {
    calls++;
    if (!modules.erase(module)) {
        complain("unload of no module");
    }
    free(module);
    return SUCCESS;
}
int cuModuleGetFunction(void ** function, void * module, const char * name) {
    ENTER_IN_CONTEXT("cuModuleGetFunction")
    if (!modules.count(module) || drex_emulate(name, 0, 0, 0, nullptr, 0) != 0) {
        return NOT_FOUND;
    }
    *function = const_cast<char *>(functions.insert(name).first->c_str());
    return SUCCESS;
}
int cuFuncGetAttribute(int * value, int, void *) {
    ENTER_IN_CONTEXT("cuFuncGetAttribute")
    *value = 64;
    return SUCCESS;
}
int cuMemAlloc_v2(uint64_t * p, size_t bytes) {
    ENTER_IN_CONTEXT("cuMemAlloc")
    not_in_a_capture("cuMemAlloc");
    void * m = drex_fake_alloc(bytes);
    memset(m, 0xa5, bytes);
    *p = reinterpret_cast<uintptr_t>(m);
    return SUCCESS;
}
int cuMemFree_v2(uint64_t p) {
    calls++;
    if (!device.count(p)) {
        complain("free of no device memory");
        return INVALID_VALUE;
    }
    // On a device, freeing waits for what runs.
    for (auto & s : streams) {
        drain(s.second);
    }
    drex_fake_free(reinterpret_cast<void *>(p));
    return SUCCESS;
}
int cuMemHostAlloc(void ** p, size_t bytes, unsigned) {
    ENTER_IN_CONTEXT("cuMemHostAlloc")
    not_in_a_capture("cuMemHostAlloc");
    *p = malloc(bytes);
    memset(*p, 0x5a, bytes);
    pinned[reinterpret_cast<uintptr_t>(*p)] = bytes;
    return SUCCESS;
}
int cuMemHostGetDevicePointer_v2(uint64_t * d, void * p, unsigned) {
    ENTER_IN_CONTEXT("cuMemHostGetDevicePointer")
    *d = reinterpret_cast<uintptr_t>(p);
    return pinned.count(*d) ? SUCCESS : INVALID_VALUE;
}
int cuMemFreeHost(void * p) {
    calls++;
    if (!pinned.erase(reinterpret_cast<uintptr_t>(p))) {
        complain("free of no pinned memory");
        return INVALID_VALUE;
    }
    for (auto & s : streams) {
        drain(s.second);
    }
    free(p);
    return SUCCESS;
}
int cuMemsetD8_v2(uint64_t p, unsigned char v, size_t bytes) {
    ENTER_IN_CONTEXT("cuMemsetD8")
    not_in_a_capture("cuMemsetD8");
    if (!inside(device, reinterpret_cast<void *>(p), bytes)) {
        complain("memset outside of device memory");
        return INVALID_VALUE;
    }
    Work w = {};
    w.args.assign(bytes, static_cast<char>(v));
    w.to = reinterpret_cast<void *>(p);
    w.bytes = bytes;
    return enqueue(nullptr, std::move(w));
}
int cuMemcpyHtoD_v2(uint64_t to, const void * from, size_t bytes) {
    ENTER_IN_CONTEXT("cuMemcpyHtoD")
    not_in_a_capture("cuMemcpyHtoD");
    if (!inside(device, reinterpret_cast<void *>(to), bytes)) {
        complain("copy to outside of device memory");
        return INVALID_VALUE;
    }
    // The source may be read later than this returns only by the copy itself.
    const char * p = static_cast<const char *>(from);
    Work w = {};
    w.args.assign(p, p + bytes);
    w.to = reinterpret_cast<void *>(to);
    w.bytes = bytes;
    return enqueue(nullptr, std::move(w));
}
int cuMemcpyDtoHAsync_v2(void * to, uint64_t from, size_t bytes, void * stream) {
    ENTER_IN_CONTEXT("cuMemcpyDtoHAsync")
    if (!inside(device, reinterpret_cast<void *>(from), bytes) || !inside(pinned, to, bytes)) {
        complain("copy from outside of device memory, or to pageable memory");
        return INVALID_VALUE;
    }
    Work w = {};
    w.to = to;
    w.from = reinterpret_cast<void *>(from);
    w.bytes = bytes;
    return enqueue(stream, std::move(w));
}
int cuPointerGetAttribute(void * value, int attribute, uint64_t p) {
    ENTER_IN_CONTEXT("cuPointerGetAttribute")
    if (attribute != 3 || !inside(device, reinterpret_cast<void *>(p), 1)) {
        return INVALID_VALUE;
    }
    memcpy(value, &p, sizeof p);
    return SUCCESS;
}
int cuEventCreate(void ** event, unsigned) {
    ENTER_IN_CONTEXT("cuEventCreate")
    *event = new Event;
    events.insert(*event);
    return SUCCESS;
}
int cuEventDestroy_v2(void * event) {
    calls++;
    if (!events.erase(event)) {
        complain("destruction of no event");
        return INVALID_HANDLE;
    }
    delete static_cast<Event *>(event);
    return SUCCESS;
}
int cuEventRecord(void * event, void * stream) {
    ENTER_IN_CONTEXT("cuEventRecord")
    if (streams[stream].capturing) {
        complain("event recorded in a capture");
    }
    static_cast<Event *>(event)->stream = &streams[stream];
    return SUCCESS;
}
int cuEventSynchronize(void * event) {
    ENTER_IN_CONTEXT("cuEventSynchronize")
    not_in_a_capture("cuEventSynchronize");
    if (Stream * s = static_cast<Event *>(event)->stream) {
        drain(*s);
    }
    return SUCCESS;
}
int cuStreamIsCapturing(void * stream, int * status) {
    ENTER_IN_CONTEXT("cuStreamIsCapturing")
    *status = streams[stream].capturing;
    return SUCCESS;
}
int cuCtxSynchronize() {
    for (auto & s : streams) {
        drain(s.second);
    }
    return SUCCESS;
}
int cuStreamSynchronize(void * stream) {
    ENTER_IN_CONTEXT("cuStreamSynchronize")
    not_in_a_capture("cuStreamSynchronize");
    drain(streams[stream]);
    return SUCCESS;
}
int cuLaunchKernel(void * function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void * stream, void ** args, void ** extra) {
    ENTER_IN_CONTEXT("cuLaunchKernel")
    const std::string name = static_cast<const char *>(function);
    if (!functions.count(name) || gx == 0 || gy == 0 || gy > 65535 || gz != 1 || bx == 0 || by != 1 || bz != 1 ||
        shared != 0 || extra) {
        complain("bad launch of " + name);
        return INVALID_VALUE;
    }
    Work w = {};
    w.kernel = name;
    const char * p = static_cast<const char *>(args[0]);
    w.args.assign(p, p + args_size(name));
    w.grid_x = gx;
    w.grid_y = gy;
    w.threads = bx;
    return enqueue(stream, std::move(w));
}

// What programs ask for that drex does not: tools/gpu/kernels.cpp.
int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int * version) {
    *version = 0;
    return SUCCESS;
}
int cuDeviceGet(int * device_number, int) {
    *device_number = 0;
    return SUCCESS;
}
int cuDeviceGetName(char * name, int n, int) {
    snprintf(name, static_cast<size_t>(n), "none (kernels on the CPU)");
    return SUCCESS;
}
int cuDeviceGetAttribute(int * value, int, int) {
    *value = 1;
    return SUCCESS;
}
int cuModuleLoad(void **, const char *) { return NOT_FOUND; }
int cuDevicePrimaryCtxRetain(void ** context, int) {
    *context = &contexts;
    return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxSetCurrent(void * context) {
    drex_fake_context(context);
    return SUCCESS;
}
int cuCtxGetDevice(int * device_number) { return cuDeviceGet(device_number, 0); }
int cuStreamCreate(void ** stream, unsigned) {
    *stream = new char;
    return SUCCESS;
}
int cuStreamDestroy_v2(void * stream) {
    drain(streams[stream]);
    delete static_cast<char *>(stream);
    return SUCCESS;
}
int cuMemcpyDtoH_v2(void * to, uint64_t from, size_t bytes) {
    if (!inside(device, reinterpret_cast<void *>(from), bytes)) {
        complain("copy from outside of device memory");
        return INVALID_VALUE;
    }
    memcpy(to, reinterpret_cast<void *>(from), bytes);
    return SUCCESS;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void * stream) {
    Work w = {};
    w.to = reinterpret_cast<void *>(to);
    w.from = reinterpret_cast<void *>(from);
    w.bytes = bytes;
    return enqueue(stream, std::move(w));
}
int cuStreamBeginCapture_v2(void * stream, int) {
    streams[stream].capturing = true;
    streams[stream].captured.clear();
    return SUCCESS;
}
int cuStreamEndCapture(void * stream, void ** graph) {
    Stream & s = streams[stream];
    s.capturing = false;
    *graph = new std::vector<Work>(std::move(s.captured));
    s.captured.clear();
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(void ** exec, void * graph, unsigned long long) {
    *exec = new std::vector<Work>(*static_cast<std::vector<Work> *>(graph));
    return SUCCESS;
}
int cuGraphLaunch(void * exec, void * stream) {
    for (const Work & w : *static_cast<std::vector<Work> *>(exec)) {
        streams[stream].work.push_back(w);
    }
    return SUCCESS;
}
int cuGraphDestroy(void * graph) {
    delete static_cast<std::vector<Work> *>(graph);
    return SUCCESS;
}
int cuGraphExecDestroy(void * exec) { return cuGraphDestroy(exec); }
int cuEventElapsedTime_v2(float * ms, void *, void *) {
    *ms = 1.0f;
    return SUCCESS;
}

}  // extern "C"
