// cold.cpp: reads cold.gguf in place.
#include "cold.h"

#include <algorithm>
#include <numeric>

// Rows inside a bundle start at multiples of this, so that none shares a cache line with its neighbour.
static const size_t ROW_ALIGN = 64;

static size_t padded(size_t n) {
    return (n + ROW_ALIGN - 1) / ROW_ALIGN * ROW_ALIGN;
}

// Puts the next row of the bundle at *offset; type_id comes from the file and is checked before it is used.
static bool add_rows(pinfer_rows * rows, uint32_t type_id, int64_t n_embd, const uint8_t * data, size_t * offset) {
    const pinfer_kernel * kernel = type_id < GGML_TYPE_COUNT ? pinfer_kernel_get((ggml_type) type_id) : nullptr;
    if (!kernel || n_embd % ggml_blck_size(kernel->type) != 0) {
        return false;
    }
    rows->kernel = kernel;
    rows->data   = data + *offset;
    *offset += padded(ggml_row_size(kernel->type, n_embd));
    return true;
}

static bool read_layer(pinfer_cold * c, int il, bool gated, uint32_t gate_type, uint32_t up_type, uint32_t down_type,
                       std::string * err) {
    const std::string blk = "blk." + std::to_string(il) + ".";
    const std::string bad = c->file.path + ": layer " + std::to_string(il) + " is damaged; make it anew with: pinfer split";
    const int64_t     id  = gguf_find_tensor(c->file.gguf, (blk + "neurons").c_str());
    if (id < 0) {
        return true; // every neuron of the layer is hot
    }
    pinfer_neurons & layer = c->layers[(size_t) il];
    layer.n                = gguf_get_tensor_ne(c->file.gguf, id)[0];

    const int64_t bundle_id = gguf_find_tensor(c->file.gguf, (blk + "cold").c_str());
    const int64_t stride    = bundle_id < 0 ? 0 : gguf_get_tensor_ne(c->file.gguf, bundle_id)[0];
    pinfer_blob   ids, bundle, gate_bias, up_bias;
    if (!pinfer_artefact_tensor(&c->file, (blk + "neurons").c_str(), GGML_TYPE_I32, layer.n, 1, &ids, err) ||
        !pinfer_artefact_tensor(&c->file, (blk + "cold").c_str(), GGML_TYPE_I8, stride, layer.n, &bundle, err) ||
        !pinfer_artefact_tensor(&c->file, (blk + "ffn_gate.bias").c_str(), GGML_TYPE_F32, layer.n, 1, &gate_bias, err) ||
        !pinfer_artefact_tensor(&c->file, (blk + "ffn_up.bias").c_str(), GGML_TYPE_F32, layer.n, 1, &up_bias, err)) {
        return false;
    }
    size_t offset = 0;
    if (!bundle.data || (gated && !add_rows(&layer.gate, gate_type, c->n_embd, bundle.data, &offset)) ||
        !add_rows(&layer.up, up_type, c->n_embd, bundle.data, &offset) ||
        !add_rows(&layer.down, down_type, c->n_embd, bundle.data, &offset) || offset != (size_t) stride) {
        *err = bad;
        return false;
    }
    layer.ids = (const int32_t *) ids.data;
    for (int64_t j = 0; j < layer.n; j++) {
        if (layer.ids[j] < 0 || layer.ids[j] >= c->n_ff) {
            *err = bad;
            return false;
        }
    }
    layer.by_id.resize((size_t) layer.n);
    std::iota(layer.by_id.begin(), layer.by_id.end(), 0);
    std::sort(layer.by_id.begin(), layer.by_id.end(), [&](int32_t a, int32_t b) { return layer.ids[a] < layer.ids[b]; });
    layer.gate.stride = layer.up.stride = layer.down.stride = (size_t) stride;
    layer.gate.bias = (const float *) gate_bias.data;
    layer.up.bias   = (const float *) up_bias.data;
    return true;
}

bool pinfer_cold_open(pinfer_cold * c, const char * path, const char * model_path, const char * fingerprint,
                      std::string * err) {
    if (!pinfer_artefact_open(&c->file, path, "cold", model_path, fingerprint, err)) {
        return false;
    }
    uint32_t              n_layer = 0, n_embd = 0, n_ff = 0;
    std::vector<uint32_t> gate, up, down;
    const bool            gated = pinfer_artefact_u32_array(&c->file, "pinfer.cold.gate_type", &gate);
    if (!pinfer_artefact_u32(&c->file, "pinfer.n_layer", &n_layer) ||
        !pinfer_artefact_u32(&c->file, "pinfer.n_embd", &n_embd) ||
        !pinfer_artefact_u32(&c->file, "pinfer.n_ff", &n_ff) ||
        !pinfer_artefact_str(&c->file, "pinfer.placement.id", &c->placement_id) ||
        !pinfer_artefact_u32_array(&c->file, "pinfer.cold.up_type", &up) ||
        !pinfer_artefact_u32_array(&c->file, "pinfer.cold.down_type", &down) || up.size() != n_layer ||
        down.size() != n_layer || (gated && gate.size() != n_layer)) {
        *err = std::string(path) + " lacks a key; make it anew with: pinfer split " + model_path;
        return false;
    }
    c->n_embd = n_embd;
    c->n_ff   = n_ff;
    c->layers.resize(n_layer);
    for (uint32_t il = 0; il < n_layer; il++) {
        if (!read_layer(c, (int) il, gated, gated ? gate[il] : 0, up[il], down[il], err)) {
            return false;
        }
    }
    return true;
}
