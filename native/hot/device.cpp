// device.cpp: a hot device: its shard is read, checked and copied there once.
#include "device.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <cstring>
#include <system_error>

// The open devices of the process. Slots instead of a list: the caller who asks which are at work may be about to abort.
static std::atomic<const pinfer_hot *> open_devices[256];

static void list_device(const pinfer_hot * hot) {
    for (auto & slot : open_devices) {
        const pinfer_hot * none = nullptr;
        if (slot.compare_exchange_strong(none, hot)) {
            return;
        }
    }
}

bool pinfer_hot_at_work(char * text, size_t text_len) {
    int    layer = -1;
    size_t used  = 0;
    for (const auto & slot : open_devices) {
        const pinfer_hot * const hot = slot;
        const int                il  = hot ? hot->layer_in_flight.load() : -1;
        if (il >= 0 && used < text_len) {
            used += (size_t) snprintf(text + used, text_len - used, "%s %s", layer < 0 ? "device" : " or", hot->name.c_str());
            layer = il;
        }
    }
    if (layer >= 0 && used < text_len) {
        snprintf(text + used, text_len - used, " failed in layer %d", layer);
    }
    return layer >= 0;
}

pinfer_hot::~pinfer_hot() {
    for (auto & slot : open_devices) {
        const pinfer_hot * self = this;
        slot.compare_exchange_strong(self, nullptr);
    }
    pinfer_hot_stop_thread(this);
    if (backend) {
        ggml_backend_synchronize(backend); // it may still be reading what is freed below
    }
    if (pinned) {
        ggml_backend_buffer_free(pinned);
    }
    if (galloc) {
        ggml_gallocr_free(galloc);
    }
    if (buffer) {
        ggml_backend_buffer_free(buffer);
    }
    if (weights) {
        ggml_free(weights);
    }
    if (backend) {
        ggml_backend_free(backend);
    }
}

// The device of that name, or without one the index-th GPU.
static ggml_backend_dev_t find_device(const char * name, int index, std::string * err) {
    std::string known;
    int         n_gpus = 0;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const auto         type = ggml_backend_dev_type(dev);
        if (type == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            continue; // libraries beside the CPU, no place for weights
        }
        const bool is_gpu = type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
        if (name ? !strcasecmp(ggml_backend_dev_name(dev), name) : is_gpu && n_gpus == index) {
            return dev;
        }
        n_gpus += is_gpu;
        known += (known.empty() ? "" : ", ") + std::string(ggml_backend_dev_name(dev));
    }
    if (name) {
        *err = "no device named " + std::string(name) + " (there are: " + known + "); choose one with --hot-device";
    } else if (n_gpus == 0) {
        *err = "the placement puts neurons on a GPU, but this machine has none; type: pinfer solve --vram 0, then "
               "pinfer split (or choose a device with --hot-device)";
    } else {
        *err = "the placement puts neurons on " + std::to_string(index + 1) + " GPUs, but this machine has " +
               std::to_string(n_gpus) + "; choose devices with --hot-device, or type: pinfer solve, then pinfer split";
    }
    return nullptr;
}

// Makes the tensor `name` of the file (if there) in the weights context.
static bool declare(pinfer_hot * hot, const std::string & name, int64_t ne0, int64_t ne1, int64_t ne2, ggml_tensor ** out,
                    std::string * err) {
    pinfer_blob blob;
    if (!pinfer_artefact_tensor(&hot->file, name, GGML_TYPE_COUNT, ne0, ne1, &blob, err, ne2)) {
        return false;
    }
    *out = blob.data ? ggml_new_tensor_3d(hot->weights, blob.type, ne0, ne1, ne2) : nullptr;
    if (*out) {
        ggml_set_name(*out, name.c_str());
    }
    return true;
}

static bool declare_ffn(pinfer_hot * hot, int ffn, const pinfer_origin & origin, std::string * err) {
    const std::string         name   = pinfer_ffn_name(ffn);
    const pinfer_ffn_header & header = origin.header.ffns[(size_t) ffn];
    const bool                is_stack = pinfer_ffn_kind_of(ffn) == PINFER_FFN_EXPERTS;
    pinfer_hot_ffn &          f      = hot->ffns[(size_t) ffn];
    f.n_embd                         = header.n_embd();
    if (!pinfer_artefact_units(&hot->file, origin, ffn, &f.ids, &f.n, err)) {
        return false;
    }
    if (f.n == 0) {
        return true;
    }
    const int64_t n_ff = is_stack ? header.n_ff() : f.n, n = is_stack ? f.n : 1;
    if (!declare(hot, name + ".ffn_gate.weight", f.n_embd, n_ff, n, &f.gate, err) ||
        !declare(hot, name + ".ffn_up.weight", f.n_embd, n_ff, n, &f.up, err) ||
        !declare(hot, name + ".ffn_down.weight", n_ff, f.n_embd, n, &f.down, err) ||
        !declare(hot, name + ".ffn_gate.bias", n_ff, n, 1, &f.gate_bias, err) ||
        !declare(hot, name + ".ffn_up.bias", n_ff, n, 1, &f.up_bias, err) ||
        (is_stack && !declare(hot, name + ".ffn_down.bias", f.n_embd, n, 1, &f.down_bias, err))) {
        return false;
    }
    for (const ggml_tensor * bias : {f.gate_bias, f.up_bias, f.down_bias}) {
        if (bias && bias->type != GGML_TYPE_F32) {
            return pinfer_artefact_damaged(&hot->file, std::string(bias->name) + " is not F32", err);
        }
    }
    const pinfer_activation act = hot->file.rule.act;
    if (!f.up || !f.down || (act == PINFER_ACT_OTHER || pinfer_is_gated(act)) != (f.gate != nullptr)) {
        return pinfer_artefact_damaged(&hot->file, pinfer_ffn_title(ffn) + " lacks a matrix", err);
    }
    if (is_stack) {
        f.place.assign((size_t) header.n_experts(), -1);
        for (int64_t j = 0; j < f.n; j++) {
            f.place[(size_t) f.ids[j]] = (int32_t) j;
        }
        f.n_used = std::min<int64_t>(f.n, origin.header.n_expert_used ? origin.header.n_expert_used : f.n);
    }
    return true;
}

// Whether the calls of a device return before their work is done.
static pinfer_hot_drive drive_of(ggml_backend_t backend) {
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(ggml_backend_get_device(backend), &props);
    if (props.type == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return PINFER_HOT_INLINE;
    }
    const bool queue = props.caps.async && backend->iface.set_tensor_async && backend->iface.get_tensor_async;
    return queue ? PINFER_HOT_QUEUED : PINFER_HOT_THREADED;
}

bool pinfer_hot_read(pinfer_hot * hot, const char * path, const pinfer_origin & origin, std::string * err) {
    if (!pinfer_artefact_open(&hot->file, path, "hot", origin, err)) {
        return false;
    }
    if (!pinfer_gguf_str(hot->file.gguf, "pinfer.placement.id", &hot->placement_id)) {
        return pinfer_artefact_damaged(&hot->file, "it lacks pinfer.placement.id", err);
    }
    const size_t n_tensors = (size_t) gguf_get_n_tensors(hot->file.gguf);
    hot->weights = ggml_init({.mem_size = ggml_tensor_overhead() * (n_tensors + 1), .mem_buffer = nullptr, .no_alloc = true});
    hot->ffns.resize(origin.header.ffns.size());
    for (const int ffn : hot->file.ffns) {
        if (!declare_ffn(hot, ffn, origin, err)) {
            return false;
        }
    }
    return true;
}

bool pinfer_hot_open(pinfer_hot * hot, const char * device, int index, std::string * err) {
    if (!ggml_get_first_tensor(hot->weights)) {
        return true;
    }
    ggml_backend_dev_t dev = find_device(device, index, err);
    if (!dev) {
        return false;
    }
    const auto no_room = [&] {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        *err = "the hot neurons do not fit on " + hot->name + " (" + std::to_string(free >> 20) +
               " MiB free); type: pinfer solve --vram with less, then pinfer split";
        return false;
    };
    hot->name    = ggml_backend_dev_name(dev);
    hot->backend = ggml_backend_dev_init(dev, nullptr);
    hot->buffer  = hot->backend ? ggml_backend_alloc_ctx_tensors(hot->weights, hot->backend) : nullptr;
    if (!hot->buffer) {
        return no_room();
    }
    ggml_backend_buffer_set_usage(hot->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    if (!pinfer_hot_reserve(hot, hot->file.rule, err)) {
        return err->empty() ? no_room() : false;
    }
    for (ggml_tensor * t = ggml_get_first_tensor(hot->weights); t; t = ggml_get_next_tensor(hot->weights, t)) {
        pinfer_blob blob;
        if (!pinfer_artefact_tensor(&hot->file, t->name, t->type, t->ne[0], t->ne[1], &blob, err, t->ne[2])) {
            return false;
        }
        ggml_backend_tensor_set(t, blob.data, 0, ggml_nbytes(t));
    }
    hot->drive = drive_of(hot->backend);
    try {
        if (hot->drive == PINFER_HOT_THREADED) {
            pinfer_hot_start_thread(hot);
        }
    } catch (const std::system_error & e) {
        *err = "no thread can be made for device " + hot->name + " (" + e.what() + "); raise the limit with: ulimit -u";
        return false;
    }
    list_device(hot);
    return true;
}

size_t pinfer_hot_bytes(const pinfer_hot * hot) {
    return (hot->buffer ? ggml_backend_buffer_get_size(hot->buffer) : 0) + hot->compute_size;
}

void pinfer_hot_set_n_threads(pinfer_hot * hot, int n_threads) {
    if (!hot->backend || hot->n_threads == n_threads) {
        return;
    }
    hot->n_threads         = n_threads;
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(hot->backend));
    auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) {
        set(hot->backend, n_threads);
    }
}
