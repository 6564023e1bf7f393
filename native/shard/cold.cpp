// cold.cpp: reads cold.gguf in place.
#include "cold.h"

#include "pinfer.h"

static bool damaged(const pinfer_cold * c, const std::string & cause, std::string * err) {
    *err = c->file.path + " is damaged: " + cause + c->file.remake;
    return false;
}

// A matrix with a row of n_embd for each of n neurons, and their biases (null: they have none), which may be absent.
static bool read_rows(const pinfer_cold * c, const std::string & name, const std::string * bias_name, int64_t n,
                      pinfer_rows * rows, std::string * err) {
    pinfer_blob weight, bias;
    if (!pinfer_artefact_tensor(&c->file, name.c_str(), GGML_TYPE_COUNT, c->n_embd, n, &weight, err) ||
        (bias_name && !pinfer_artefact_tensor(&c->file, bias_name->c_str(), GGML_TYPE_F32, n, 1, &bias, err))) {
        return false;
    }
    if (!weight.data) {
        return damaged(c, "it has no tensor " + name, err);
    }
    rows->kernel = pinfer_kernel_get(weight.type);
    if (!rows->kernel || c->n_embd % ggml_blck_size(weight.type) != 0) {
        return damaged(c, name + " is of type " + ggml_type_name(weight.type) + ", which no FFN has", err);
    }
    rows->data   = weight.data;
    rows->stride = ggml_row_size(weight.type, c->n_embd);
    rows->bias   = (const float *) bias.data;
    return true;
}

static bool read_layer(pinfer_cold * c, int il, bool gated, std::string * err) {
    const std::string blk = "blk." + std::to_string(il) + ".";
    const int64_t     id  = gguf_find_tensor(c->file.gguf, (blk + "neurons").c_str());
    if (id < 0) {
        return true; // every neuron of the layer is hot
    }
    pinfer_neurons & layer = c->layers[(size_t) il];
    layer.n                = gguf_get_tensor_ne(c->file.gguf, id)[0];

    const std::string gate_bias = blk + "ffn_gate.bias", up_bias = blk + "ffn_up.bias";
    pinfer_blob       ids;
    if (!pinfer_artefact_tensor(&c->file, (blk + "neurons").c_str(), GGML_TYPE_I32, layer.n, 1, &ids, err) ||
        (gated && !read_rows(c, blk + "ffn_gate.weight", &gate_bias, layer.n, &layer.gate, err)) ||
        !read_rows(c, blk + "ffn_up.weight", &up_bias, layer.n, &layer.up, err) ||
        !read_rows(c, blk + "ffn_down_t.weight", nullptr, layer.n, &layer.down, err)) {
        return false;
    }
    layer.ids = (const int32_t *) ids.data;
    for (int64_t j = 0; j < layer.n; j++) {
        if (layer.ids[j] < 0 || layer.ids[j] >= c->n_ff) {
            return damaged(c, "layer " + std::to_string(il) + " names neurons that the model has not", err);
        }
    }
    return true;
}

bool pinfer_cold_open(pinfer_cold * c, const char * path, const pinfer_origin & origin, std::string * err) {
    if (!pinfer_artefact_open(&c->file, path, "cold", origin, err)) {
        return false;
    }
    uint32_t    n_layer = 0, n_embd = 0, n_ff = 0;
    std::string activation;
    if (!pinfer_artefact_u32(&c->file, "pinfer.n_layer", &n_layer) ||
        !pinfer_artefact_u32(&c->file, "pinfer.n_embd", &n_embd) ||
        !pinfer_artefact_u32(&c->file, "pinfer.n_ff", &n_ff) ||
        !pinfer_artefact_str(&c->file, "pinfer.activation", &activation) ||
        !pinfer_artefact_str(&c->file, "pinfer.placement.id", &c->placement_id)) {
        return damaged(c, "it lacks a key", err);
    }
    c->n_embd = n_embd;
    c->n_ff   = n_ff;
    c->layers.resize(n_layer);
    const pinfer_activation act   = pinfer_activation_parse(activation.c_str());
    const bool              gated = act == PINFER_ACT_REGLU || act == PINFER_ACT_DRELU;
    for (uint32_t il = 0; il < n_layer; il++) {
        if (!read_layer(c, (int) il, gated, err)) {
            return false;
        }
    }
    return true;
}
