// plugin.cpp: the ggml backend "PINFER": context, buffer type, device, registry.
#include "plan.h"
#include "ggml-backend-impl.h"
#include "model.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sys/mman.h>
#include <unistd.h>

#ifndef PINFER_GGML_VERSION
#    error "PINFER_GGML_VERSION must name the ggml version of the headers, e.g. \"0.25.3\""
#endif

static ggml_backend_reg_t pinfer_reg();
static ggml_backend_dev_t pinfer_device();
static void               buffer_free(ggml_backend_buffer_t buffer);

// buffer: host memory in ggml's standard layout, or a mapped model file

static const size_t BUFFER_ALIGN = 64;

namespace {

struct buffer_memory {
    void * data;
    bool   owned;
    bool   mapped_file; // its pages can be given back: they are read anew when touched
};

} // namespace

// Whether all of these bytes are a shared mapping (of a file; memory shared otherwise is no weight of a model).
static bool is_shared_mapping(const void * data, size_t size) {
    FILE * maps = fopen("/proc/self/maps", "r");
    if (!maps) {
        return false;
    }
    const uintptr_t begin = (uintptr_t) data, end = begin + size;
    uintptr_t       reached = begin, low = 0, high = 0;
    char            mode[5] = "", line[512];
    while (reached < end && fgets(line, sizeof(line), maps)) {
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s", &low, &high, mode) == 3 && low <= reached && reached < high) {
            if (mode[3] != 's') {
                break;
            }
            reached = high;
        }
    }
    fclose(maps);
    return reached >= end;
}

void pinfer_release_weight(const ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    if (!buffer || buffer->iface.free_buffer != buffer_free || !((const buffer_memory *) buffer->context)->mapped_file) {
        return;
    }
    const size_t    page  = (size_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) weight->data + page - 1) / page * page;
    const uintptr_t end   = ((uintptr_t) weight->data + ggml_nbytes(weight)) / page * page;
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_DONTNEED);
    }
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return ((buffer_memory *) buffer->context)->data;
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    buffer_memory * const memory = (buffer_memory *) buffer->context;
    if (memory->owned) {
        free(memory->data);
    }
    delete memory;
}

static void buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}

static void buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
}

static void buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
}

static bool buffer_cpy_tensor(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    if (!ggml_backend_buffer_is_host(src->buffer)) {
        return false;
    }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(buffer_get_base(buffer), value, buffer->size);
}

static const ggml_backend_buffer_i buffer_interface = {
    .free_buffer   = buffer_free,
    .get_base      = buffer_get_base,
    .init_tensor   = nullptr,
    .memset_tensor = buffer_memset_tensor,
    .set_tensor    = buffer_set_tensor,
    .get_tensor    = buffer_get_tensor,
    .set_tensor_2d = nullptr,
    .get_tensor_2d = nullptr,
    .cpy_tensor    = buffer_cpy_tensor,
    .clear         = buffer_clear,
    .reset         = nullptr,
};

// buffer type

static const char * buft_get_name(ggml_backend_buffer_type_t) {
    return "PINFER";
}

static ggml_backend_buffer_t make_buffer(ggml_backend_buffer_type_t buft, const buffer_memory & memory, size_t size) {
    return ggml_backend_buffer_init(buft, buffer_interface, new buffer_memory(memory), size);
}

static ggml_backend_buffer_t buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    // never empty: a probe of size 0 must have a base too
    void * data = aligned_alloc(BUFFER_ALIGN, (size / BUFFER_ALIGN + 1) * BUFFER_ALIGN);
    return data ? make_buffer(buft, {data, true, false}, size) : nullptr;
}

static size_t buft_get_alignment(ggml_backend_buffer_type_t) {
    return BUFFER_ALIGN;
}

static bool buft_is_host(ggml_backend_buffer_type_t) {
    return true;
}

static ggml_backend_buffer_type_t pinfer_buffer_type() {
    static ggml_backend_buffer_type type = {
        .iface = {
            .get_name       = buft_get_name,
            .alloc_buffer   = buft_alloc_buffer,
            .get_alignment  = buft_get_alignment,
            .get_max_size   = nullptr,
            .get_alloc_size = nullptr,
            .is_host        = buft_is_host,
        },
        .device  = pinfer_device(),
        .context = nullptr,
    };
    return &type;
}

// backend

static const char * backend_get_name(ggml_backend_t) {
    return "PINFER";
}

static void backend_free(ggml_backend_t backend) {
    pinfer_engine * e = (pinfer_engine *) backend->context;
    pinfer_engine_free(e);
    delete e;
    delete backend;
}

static ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) try {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    s.failure.clear();
    return pinfer_engine_compute((pinfer_engine *) backend->context, &s, graph);
} catch (const std::bad_alloc &) {
    return GGML_STATUS_ALLOC_FAILED;
} catch (const std::exception & e) {
    fprintf(stderr, "pinfer: %s\n", e.what());
    return GGML_STATUS_FAILED;
}

static const ggml_backend_i backend_interface = {
    .get_name            = backend_get_name,
    .free                = backend_free,
    .set_tensor_async    = nullptr,
    .get_tensor_async    = nullptr,
    .set_tensor_2d_async = nullptr,
    .get_tensor_2d_async = nullptr,
    .cpy_tensor_async    = nullptr,
    .synchronize         = nullptr,
    .graph_plan_create   = nullptr,
    .graph_plan_free     = nullptr,
    .graph_plan_update   = nullptr,
    .graph_plan_compute  = nullptr,
    .graph_compute       = backend_graph_compute,
    .event_record        = nullptr,
    .event_wait          = nullptr,
    .graph_optimize      = nullptr,
};

static ggml_guid_t backend_guid() {
    static ggml_guid guid = {'p', 'i', 'n', 'f', 'e', 'r', '-', 'r', 'e', 'l', 'u', '-', 'f', 'f', 'n', 's'};
    return &guid;
}

static void backend_set_n_threads(ggml_backend_t backend, int n_threads) {
    pinfer_state &              s = pinfer_state_get();
    std::lock_guard<std::mutex> lock(s.mutex);
    pinfer_engine_set_n_threads((pinfer_engine *) backend->context, n_threads);
    for (const auto & hot : s.hot) {
        pinfer_hot_set_n_threads(hot.get(), n_threads);
    }
}

// device

static const char * device_get_name(ggml_backend_dev_t) {
    return "PINFER";
}

static const char * device_get_description(ggml_backend_dev_t) {
    return "neuron-aware FFN of ReLU models";
}

static void device_get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = 0; // none of its own
}

static enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static void device_get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = device_get_name(dev);
    props->description = device_get_description(dev);
    props->type        = device_get_type(dev);
    props->caps.buffer_from_host_ptr = true; // the loader maps FFN weights in place
    props->caps.mmap_support         = true;
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) try {
    pinfer_engine * e = new pinfer_engine;
    if (!pinfer_engine_init(e)) {
        delete e;
        return nullptr;
    }
    return new ggml_backend{
        .guid    = backend_guid(),
        .iface   = backend_interface,
        .device  = dev,
        .context = e,
    };
} catch (const std::bad_alloc &) {
    return nullptr;
}

static ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t) {
    return pinfer_buffer_type();
}

static ggml_backend_buffer_t device_buffer_from_host_ptr(ggml_backend_dev_t, void * ptr, size_t size, size_t) {
    return make_buffer(pinfer_buffer_type(), {ptr, false, is_shared_mapping(ptr, size)}, size);
}

// While a model loads, a weight has no buffer yet or a probe of the type that is being tried.
static bool weight_is_ours(const ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    return !buffer || buffer->buft == pinfer_buffer_type();
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const pinfer_activation act = pinfer_state_get().rule.act;
    return act != PINFER_ACT_OTHER && pinfer_match_claims(op, act != PINFER_ACT_GRAPH, weight_is_ours);
}

static bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return ggml_backend_buft_is_host(buft);
}

static const ggml_backend_device_i device_interface = {
    .get_name             = device_get_name,
    .get_description      = device_get_description,
    .get_memory           = device_get_memory,
    .get_type             = device_get_type,
    .get_props            = device_get_props,
    .init_backend         = device_init_backend,
    .get_buffer_type      = device_get_buffer_type,
    .get_host_buffer_type = nullptr,
    .buffer_from_host_ptr = device_buffer_from_host_ptr,
    .supports_op          = device_supports_op,
    .supports_buft        = device_supports_buft,
    .offload_op           = nullptr,
    .event_new            = nullptr,
    .event_free           = nullptr,
    .event_synchronize    = nullptr,
};

static ggml_backend_dev_t pinfer_device() {
    static ggml_backend_device device = {
        .iface   = device_interface,
        .reg     = pinfer_reg(),
        .context = nullptr,
    };
    return &device;
}

// registry

static const char * reg_get_name(ggml_backend_reg_t) {
    return "PINFER";
}

static size_t reg_get_device_count(ggml_backend_reg_t) {
    return 1;
}

static ggml_backend_dev_t reg_get_device(ggml_backend_reg_t, size_t) {
    return pinfer_device();
}

static void * reg_get_proc_address(ggml_backend_reg_t, const char * name) {
    return strcmp(name, "ggml_backend_set_n_threads") == 0 ? (void *) backend_set_n_threads : nullptr;
}

static ggml_backend_reg_t pinfer_reg() {
    static ggml_backend_reg reg = {
        .api_version = GGML_BACKEND_API_VERSION,
        .iface = {
            .get_name         = reg_get_name,
            .get_device_count = reg_get_device_count,
            .get_device       = reg_get_device,
            .get_proc_address = reg_get_proc_address,
        },
        .context = nullptr,
    };
    return &reg;
}

// Called by ggml_backend_load(). The structures above follow one version of ggml; another may have moved their fields.
extern "C" PINFER_API ggml_backend_reg_t ggml_backend_init(void) {
    if (strcmp(ggml_version(), PINFER_GGML_VERSION) != 0) {
        fprintf(stderr, "pinfer: this plugin was built for ggml %s, but the program runs ggml %s; rebuild it with: make build\n",
                PINFER_GGML_VERSION, ggml_version());
        return nullptr;
    }
    pinfer_state_configure_from_env();
    return pinfer_reg();
}
