// backend.cpp: the ggml backend "PINFER": backend, device, registry.
#include "attention.h"
#include "automatic.h"
#include "buffer.h"
#include "engine.h"
#include "ggml-backend-impl.h"
#include "match.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <exception>
#include <new>

#ifndef PINFER_GGML_VERSION
#    error "PINFER_GGML_VERSION must name the ggml version of the headers, e.g. \"0.25.3\""
#endif

extern "C" PINFER_API ggml_backend_reg_t ggml_backend_init(void);

static ggml_backend_reg_t pinfer_reg();
static ggml_backend_dev_t pinfer_device();

// backend

static const char * backend_get_name(ggml_backend_t) {
    return "PINFER";
}

static void backend_free(ggml_backend_t backend) {
    pinfer_engine * e = (pinfer_engine *) backend->context;
    pinfer_engine_finish(e);
    pinfer_team_free(&e->team);
    delete e;
    delete backend;
}

static ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) try {
    return pinfer_engine_compute((pinfer_engine *) backend->context, graph);
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
    pinfer_team_set_n_threads(&((pinfer_engine *) backend->context)->team, n_threads);
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
    auto engine = std::make_unique<pinfer_engine>();
    if (!pinfer_team_init(&engine->team)) {
        return nullptr;
    }
    pinfer_automatic_say_idle();
    return new ggml_backend{
        .guid    = backend_guid(),
        .iface   = backend_interface,
        .device  = dev,
        .context = engine.release(),
    };
} catch (const std::bad_alloc &) {
    return nullptr;
}

static ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t dev) {
    return pinfer_buffer_type(dev);
}

static ggml_backend_buffer_t device_buffer_from_host_ptr(ggml_backend_dev_t dev, void * ptr, size_t size, size_t) {
    return pinfer_buffer_from_host(dev, ptr, size);
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) try {
    const pinfer_claim claim = pinfer_match_claim(op);
    if (!claim.weight) {
        return pinfer_engine_must_refuse(op);
    }
    const auto m = pinfer_model_of_weight(claim.weight);
    if (m) {
        m->asked = true;
    }
    const pinfer_activation act = m ? m->rule().act : PINFER_ACT_OTHER;
    if (m && act == PINFER_ACT_OTHER) { // a stack with experts on a device; while it loads, llama.cpp chooses where it lies
        return pinfer_weight_is_elsewhere(claim.weight) && !claim.adapted && op->op != GGML_OP_UNARY;
    }
    if (op->op == GGML_OP_ADD_ID) {
        return false; // biases of experts with exact zeros
    }
    // behind an adapter the products are not claimed, but the activation must still be the model's
    return act != PINFER_ACT_OTHER && (!claim.adapted || act != PINFER_ACT_GRAPH);
} catch (const std::exception &) {
    return false;
}

static bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    // with those of the CPU whose layout is another: experts stay in them
    static ggml_backend_dev_t const cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return ggml_backend_buft_is_host(buft) || (cpu && ggml_backend_dev_supports_buft(cpu, buft));
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

// A program that was started with LD_PRELOAD=libggml-pinfer.so, and is linked with libllama, gets the backend before main():
// llama.cpp loads no backend by itself where one is linked in.
__attribute__((constructor)) static void register_preloaded() {
    const char * const preload = getenv("LD_PRELOAD");
    if (preload && strstr(preload, "libggml-pinfer") && dlsym(RTLD_DEFAULT, "llama_model_load_from_file")) {
        if (ggml_backend_reg_t reg = ggml_backend_init()) {
            ggml_backend_register(reg);
        }
    }
}

// Called by ggml_backend_load(). The structures above follow one version of ggml; another may have moved their fields.
extern "C" PINFER_API ggml_backend_reg_t ggml_backend_init(void) {
    if (strcmp(ggml_version(), PINFER_GGML_VERSION) != 0) {
        fprintf(stderr, "pinfer: this plugin was built for ggml %s, but the program runs ggml %s; rebuild it with: make build\n",
                PINFER_GGML_VERSION, ggml_version());
        return nullptr;
    }
    pinfer_attention_install();
    return pinfer_reg();
}
