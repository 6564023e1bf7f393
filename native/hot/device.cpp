// hot.cpp: a hot device: its shard is read, checked and copied there once.
#include "device.h"

#include "ggml-backend-impl.h"

#include <cstring>

pinfer_hot::~pinfer_hot() {
    pinfer_hot_stop_thread(this);
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
        *err = "no device named " + std::string(name) + " (there are: " + known + "); choose one with --device";
    } else if (n_gpus == 0) {
        *err = "the placement puts neurons on a GPU, but this machine has none; type: pinfer solve --vram 0, then "
               "pinfer split (or choose a device with --device)";
    } else {
        *err = "the placement puts neurons on " + std::to_string(index + 1) + " GPUs, but this machine has " +
               std::to_string(n_gpus) + "; choose devices with --device, or type: pinfer solve, then pinfer split";
    }
    return nullptr;
}

// Makes the tensor `name` of the file (if there) in the weights context.
static bool declare(pinfer_hot * hot, const std::string & name, int64_t ne0, int64_t ne1, ggml_tensor ** out,
                    std::string * err) {
    pinfer_blob blob;
    if (!pinfer_artefact_tensor(&hot->file, name.c_str(), GGML_TYPE_COUNT, ne0, ne1, &blob, err)) {
        return false;
    }
    *out = blob.data ? ggml_new_tensor_2d(hot->weights, blob.type, ne0, ne1) : nullptr;
    if (*out) {
        ggml_set_name(*out, name.c_str());
    }
    return true;
}

static bool declare_layer(pinfer_hot * hot, int il, int64_t n_ff, bool gated, std::string * err) {
    const std::string blk = "blk." + std::to_string(il) + ".";
    const std::string bad = hot->file.path + ": layer " + std::to_string(il) + " is damaged; make it anew with: pinfer split";
    const int64_t     id  = gguf_find_tensor(hot->file.gguf, (blk + "neurons").c_str());
    if (id < 0) {
        return true;
    }
    pinfer_hot_layer & layer = hot->layers[(size_t) il];
    layer.n                  = gguf_get_tensor_ne(hot->file.gguf, id)[0];
    pinfer_blob ids;
    if (!pinfer_artefact_tensor(&hot->file, (blk + "neurons").c_str(), GGML_TYPE_I32, layer.n, 1, &ids, err) ||
        !declare(hot, blk + "ffn_gate.weight", hot->n_embd, layer.n, &layer.gate, err) ||
        !declare(hot, blk + "ffn_up.weight", hot->n_embd, layer.n, &layer.up, err) ||
        !declare(hot, blk + "ffn_down.weight", layer.n, hot->n_embd, &layer.down, err) ||
        !declare(hot, blk + "ffn_gate.bias", layer.n, 1, &layer.gate_bias, err) ||
        !declare(hot, blk + "ffn_up.bias", layer.n, 1, &layer.up_bias, err)) {
        return false;
    }
    layer.ids = (const int32_t *) ids.data;
    bool ok   = layer.up && layer.down && gated == (layer.gate != nullptr);
    for (int64_t j = 0; ok && j < layer.n; j++) {
        ok = layer.ids[j] >= 0 && layer.ids[j] < n_ff;
    }
    if (!ok) {
        *err = bad;
    }
    return ok;
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

// Gives the shard's tensors to the device, and makes it ready to compute.
static bool load(pinfer_hot * hot, ggml_backend_dev_t dev, const pinfer_rule & rule, std::string * err) {
    hot->name    = ggml_backend_dev_name(dev);
    hot->backend = ggml_backend_dev_init(dev, nullptr);
    hot->buffer  = hot->backend ? ggml_backend_alloc_ctx_tensors(hot->weights, hot->backend) : nullptr;
    if (!hot->buffer || !pinfer_hot_reserve(hot, rule)) {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        *err = "the hot neurons do not fit on " + hot->name + " (" + std::to_string(free >> 20) +
               " MiB free); type: pinfer solve --vram with less, then pinfer split";
        return false;
    }
    ggml_backend_buffer_set_usage(hot->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (ggml_tensor * t = ggml_get_first_tensor(hot->weights); t; t = ggml_get_next_tensor(hot->weights, t)) {
        pinfer_blob blob;
        if (!pinfer_artefact_tensor(&hot->file, t->name, t->type, t->ne[0], t->ne[1], &blob, err)) {
            return false;
        }
        ggml_backend_tensor_set(t, blob.data, 0, ggml_nbytes(t));
    }
    hot->drive = drive_of(hot->backend);
    if (hot->drive == PINFER_HOT_THREADED) {
        pinfer_hot_start_thread(hot);
    }
    return true;
}

bool pinfer_hot_open(pinfer_hot * hot, const char * path, const char * device, int index, const pinfer_origin & origin,
                     std::string * err) {
    if (!pinfer_artefact_open(&hot->file, path, "hot", origin, err)) {
        return false;
    }
    uint32_t    n_layer = 0, n_embd = 0, n_ff = 0;
    std::string activation;
    pinfer_rule rule;
    if (!pinfer_artefact_u32(&hot->file, "pinfer.n_layer", &n_layer) ||
        !pinfer_artefact_u32(&hot->file, "pinfer.n_embd", &n_embd) ||
        !pinfer_artefact_u32(&hot->file, "pinfer.n_ff", &n_ff) ||
        !pinfer_artefact_str(&hot->file, "pinfer.activation", &activation) ||
        !pinfer_artefact_str(&hot->file, "pinfer.placement.id", &hot->placement_id)) {
        *err = std::string(path) + " lacks a key" + hot->file.remake;
        return false;
    }
    rule.act = pinfer_activation_parse(activation.c_str());
    pinfer_artefact_f32(&hot->file, "pinfer.activation_threshold", &rule.threshold);
    hot->n_embd = n_embd;
    hot->layers.resize(n_layer);
    const size_t n_tensors = (size_t) gguf_get_n_tensors(hot->file.gguf);
    hot->weights = ggml_init({.mem_size = ggml_tensor_overhead() * (n_tensors + 1), .mem_buffer = nullptr, .no_alloc = true});
    for (uint32_t il = 0; il < n_layer; il++) {
        if (!declare_layer(hot, (int) il, n_ff, pinfer_is_gated(rule.act), err)) {
            return false;
        }
    }
    if (!ggml_get_first_tensor(hot->weights)) {
        return true; // nothing is hot: no device is needed
    }
    ggml_backend_dev_t dev = find_device(device, index, err);
    return dev && load(hot, dev, rule, err);
}

size_t pinfer_hot_bytes(const pinfer_hot * hot) {
    return (hot->buffer ? ggml_backend_buffer_get_size(hot->buffer) : 0) + hot->compute_size;
}

void pinfer_hot_set_n_threads(pinfer_hot * hot, int n_threads) {
    if (!hot->backend) {
        return;
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(hot->backend));
    auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) {
        set(hot->backend, n_threads);
    }
}
