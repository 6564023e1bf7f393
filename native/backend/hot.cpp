// hot.cpp: the hot device. Weights are uploaded once; a call uploads x, launches one small graph and fetches y.
#include "hot.h"

#include "ggml-backend-impl.h"

#include <cstring>

// A hot FFN has at most 14 nodes and 6 leafs.
static const size_t GRAPH_NODES = 32;

pinfer_hot::~pinfer_hot() {
    if (graph_ctx) {
        ggml_free(graph_ctx);
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

static ggml_backend_dev_t find_device(const char * name, std::string * err) {
    std::string known;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const auto         type = ggml_backend_dev_type(dev);
        if (type == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            continue; // libraries beside the CPU, no place for weights
        }
        if (name ? !strcasecmp(ggml_backend_dev_name(dev), name)
                 : type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            return dev;
        }
        known += (known.empty() ? "" : ", ") + std::string(ggml_backend_dev_name(dev));
    }
    *err = name ? "no device named " + std::string(name) + " (there are: " + known + "); choose one with --device"
                : "the placement puts neurons on a GPU, but this machine has none; type: pinfer solve --vram 0, then "
                  "pinfer split (or choose a device with --device)";
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

static bool declare_layer(pinfer_hot * hot, int il, int64_t n_ff, std::string * err) {
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
    bool ok   = layer.up && layer.down;
    for (int64_t j = 0; ok && j < layer.n; j++) {
        ok = layer.ids[j] >= 0 && layer.ids[j] < n_ff;
    }
    if (!ok) {
        *err = bad;
    }
    return ok;
}

bool pinfer_hot_open(pinfer_hot * hot, const char * path, const char * device, const pinfer_origin & origin,
                     std::string * err) {
    if (!pinfer_artefact_open(&hot->file, path, "hot", origin, err)) {
        return false;
    }
    uint32_t n_layer = 0, n_embd = 0, n_ff = 0;
    if (!pinfer_artefact_u32(&hot->file, "pinfer.n_layer", &n_layer) ||
        !pinfer_artefact_u32(&hot->file, "pinfer.n_embd", &n_embd) ||
        !pinfer_artefact_u32(&hot->file, "pinfer.n_ff", &n_ff) ||
        !pinfer_artefact_str(&hot->file, "pinfer.placement.id", &hot->placement_id)) {
        *err = std::string(path) + " lacks a key" + hot->file.remake;
        return false;
    }
    hot->n_embd = n_embd;
    hot->layers.resize(n_layer);
    const size_t n_tensors = (size_t) gguf_get_n_tensors(hot->file.gguf);
    hot->weights = ggml_init({.mem_size = ggml_tensor_overhead() * (n_tensors + 1), .mem_buffer = nullptr, .no_alloc = true});
    for (uint32_t il = 0; il < n_layer; il++) {
        if (!declare_layer(hot, (int) il, n_ff, err)) {
            return false;
        }
    }
    if (!ggml_get_first_tensor(hot->weights)) {
        return true; // nothing is hot: no device is needed
    }

    ggml_backend_dev_t dev = find_device(device, err);
    if (!dev) {
        return false;
    }
    const std::string name = ggml_backend_dev_name(dev);
    hot->backend           = ggml_backend_dev_init(dev, nullptr);
    hot->buffer = hot->backend ? ggml_backend_alloc_ctx_tensors(hot->weights, hot->backend) : nullptr;
    if (!hot->buffer) {
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        *err = "the hot neurons do not fit on " + name + " (" + std::to_string(free >> 20) +
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
    hot->galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(hot->backend));
    hot->graph_mem.resize(ggml_tensor_overhead() * GRAPH_NODES + ggml_graph_overhead_custom(GRAPH_NODES, false));
    return true;
}

size_t pinfer_hot_bytes(const pinfer_hot * hot) {
    return (hot->buffer ? ggml_backend_buffer_get_size(hot->buffer) : 0) +
           (hot->galloc ? ggml_gallocr_get_buffer_size(hot->galloc, 0) : 0);
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

static ggml_tensor * product(ggml_context * ctx, ggml_tensor * w, ggml_tensor * bias, ggml_tensor * x) {
    ggml_tensor * y = ggml_mul_mat(ctx, w, x);
    return bias ? ggml_add(ctx, y, bias) : y;
}

// pinfer_relu() of v in operations that every device has. v - threshold is above zero exactly where v is above the
// threshold; after the ReLU no infinity meets the step's zero.
static ggml_tensor * relu(ggml_context * ctx, ggml_tensor * v, float threshold) {
    v = ggml_relu(ctx, v);
    return threshold > 0.0f ? ggml_mul(ctx, v, ggml_step(ctx, ggml_scale_bias(ctx, v, 1.0f, -threshold))) : v;
}

bool pinfer_hot_begin(pinfer_hot * hot, int il, const pinfer_rule & rule, const float * x, int64_t n_tokens) {
    const pinfer_hot_layer & layer = hot->layers[(size_t) il];
    if (hot->graph_ctx) {
        ggml_free(hot->graph_ctx);
    }
    ggml_context * ctx = ggml_init({.mem_size = hot->graph_mem.size(), .mem_buffer = hot->graph_mem.data(), .no_alloc = true});
    hot->graph_ctx     = ctx;

    ggml_tensor * in = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hot->n_embd, n_tokens);
    ggml_set_input(in);
    ggml_tensor * h = product(ctx, layer.up, layer.up_bias, in);
    if (rule.act != PINFER_ACT_REGLU) {
        h = relu(ctx, h, rule.threshold);
    }
    if (layer.gate) {
        ggml_tensor * gate = product(ctx, layer.gate, layer.gate_bias, in);
        h = rule.threshold > 0.0f ? ggml_mul(ctx, relu(ctx, gate, rule.threshold), h) : ggml_reglu_split(ctx, gate, h);
    } else if (rule.act == PINFER_ACT_RELU2) {
        h = ggml_sqr(ctx, h);
    }
    hot->y = ggml_mul_mat(ctx, layer.down, h);
    ggml_set_output(hot->y);

    ggml_cgraph * graph = ggml_new_graph_custom(ctx, GRAPH_NODES, false);
    ggml_build_forward_expand(graph, hot->y);
    if (!ggml_gallocr_alloc_graph(hot->galloc, graph)) {
        return false;
    }
    ggml_backend_tensor_set_async(hot->backend, in, x, 0, ggml_nbytes(in));
    return ggml_backend_graph_compute_async(hot->backend, graph) == GGML_STATUS_SUCCESS;
}

bool pinfer_hot_end(pinfer_hot * hot, float * y, int64_t n_tokens) {
    ggml_backend_tensor_get_async(hot->backend, hot->y, y, 0, (size_t) (hot->n_embd * n_tokens) * sizeof(float));
    ggml_backend_synchronize(hot->backend);
    return true;
}
