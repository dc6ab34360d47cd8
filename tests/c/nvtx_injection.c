/* SPDX-License-Identifier: Apache-2.0
 *
 * What a profiler injects into a program, after NVTX 3's protocol: it attaches
 * itself to the tables that it is given and notes every call. With
 * FAKE_NVTX_PRINT in the environment, the notes are printed at the end.
 *
 * REFUSES: fails to attach. NO_ENTRY: is some other library. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*function)(void);

typedef struct {
    size_t struct_size;
    int (*get_module_function_table)(int module, function *** table, unsigned * size);
} callbacks;

typedef struct {
    size_t struct_size;
    uint32_t version;
    uint32_t reserved;
    void (*set_injection_version)(uint32_t version);
} version_info;

typedef struct {
    uint16_t version;
    uint16_t size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type;
    int32_t reserved;
    uint64_t payload;
    int32_t message_type;
    const void * message;
} attributes;

enum { ETID_CALLBACKS = 1, ETID_VERSION_INFO = 3, MODULE_CORE = 1, MODULE_CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING = 10, DOMAIN_CREATE = 12, MESSAGE_REGISTERED = 3 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char notes[1 << 20];
static size_t length;
static char * strings[64];
static int n_strings;
static char domain_name[64];
static __thread int depth;

static void note(const char * what, const char * text) {
    pthread_mutex_lock(&lock);
    int n = snprintf(notes + length, sizeof notes - length, "%s %s\n", what, text);
    if (n > 0 && length + (size_t) n < sizeof notes) {
        length += (size_t) n;
    } else {
        abort();
    }
    pthread_mutex_unlock(&lock);
}

/* What was noted so far. */
const char * fake_nvtx_notes(void) {
    return notes;
}

/* A line of the test's own among them. */
void fake_nvtx_note(const char * text) {
    note("host", text);
}

__attribute__((destructor)) static void print(void) {
    if (getenv("FAKE_NVTX_PRINT")) {
        fprintf(stderr, "notes:\n%s", notes);
    }
}

static void * domain_create(const char * name) {
    note("domain", name);
    snprintf(domain_name, sizeof domain_name, "%s", name);
    return domain_name;
}

static void * register_string(void * domain, const char * text) {
    note(domain == domain_name ? "string" : "bad string", text);
    strings[n_strings] = strdup(text);
    return &strings[n_strings++];
}

static int range_push(void * domain, const attributes * a) {
    const int good = domain == domain_name && a->version == 3 && a->size == sizeof *a && a->category == 0 &&
                     a->color_type == 0 && a->payload_type == 0 && a->message_type == MESSAGE_REGISTERED;
    int known = -1;
    for (int i = 0; i < n_strings; i++) {
        if (a->message == &strings[i]) {
            known = i;
        }
    }
    note(good ? "push" : "bad push", known < 0 ? "?" : strings[known]);
    return depth++;
}

static int range_pop(void * domain) {
    note(domain == domain_name && depth > 0 ? "pop" : "bad pop", domain_name);
    return --depth;
}

#ifdef NO_ENTRY
#define ENTRY some_other_function
#else
#define ENTRY InitializeInjectionNvtx2
#endif

int ENTRY(const void * (*export_table)(uint32_t id)) {
    const callbacks * c = export_table(ETID_CALLBACKS);
    const version_info * v = export_table(ETID_VERSION_INFO);
    function ** core2 = NULL;
    function ** core = NULL;
    unsigned size = 0;
    note("initialize", "");
#ifdef REFUSES
    return 0;
#endif
    if (!c || c->struct_size < sizeof *c || !v || v->version != 3 || export_table(2) || export_table(99)) {
        return 0;
    }
    v->set_injection_version(3);
    /* No such modules; of those that there are, whatever is not asked for. */
    if (c->get_module_function_table(0, &core, &size) || c->get_module_function_table(7, &core, &size) ||
        c->get_module_function_table(-1, &core, &size)) {
        return 0;
    }
    static const unsigned sizes[] = {0, 16, 9, 15, 7, 16, 7};
    for (int module = 1; module <= 6; module++) {
        function ** table;
        if (!c->get_module_function_table(module, NULL, NULL) || !c->get_module_function_table(module, &table, &size) ||
            size != sizes[module] || table[0] || table[size]) {
            return 0;
        }
        for (unsigned i = 1; i < size; i++) {
            /* A profiler may write to any of them. */
            *table[i] = NULL;
        }
    }
    c->get_module_function_table(MODULE_CORE2, &core2, &size);
    *core2[DOMAIN_CREATE] = (function) domain_create;
    *core2[REGISTER_STRING] = (function) register_string;
    *core2[RANGE_PUSH] = (function) range_push;
    *core2[RANGE_POP] = (function) range_pop;
    note("attached", "");
    return 1;
}
