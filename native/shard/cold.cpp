// cold.cpp: reads cold.gguf in place.
#include "cold.h"

#include "pinfer.h"

// A matrix with a row of n_embd for each of n neurons, and their biases (null: they have none), which may be absent.
static bool read_rows(const pinfer_cold * c, const std::string & name, const std::string * bias_name, int64_t n,
                      pinfer_rows * rows, std::string * err) {
    pinfer_blob weight, bias;
    if (!pinfer_artefact_tensor(&c->file, name.c_str(), GGML_TYPE_COUNT, c->file.n_embd, n, &weight, err) ||
        (bias_name && !pinfer_artefact_tensor(&c->file, bias_name->c_str(), GGML_TYPE_F32, n, 1, &bias, err))) {
        return false;
    }
    if (!weight.data) {
        return pinfer_artefact_damaged(&c->file, "it has no tensor " + name, err);
    }
    rows->kernel = pinfer_kernel_get(weight.type);
    if (!rows->kernel || c->file.n_embd % ggml_blck_size(weight.type) != 0) {
        return pinfer_artefact_damaged(&c->file, name + " is of type " + ggml_type_name(weight.type) + ", which no FFN has", err);
    }
    rows->data   = weight.data;
    rows->stride = ggml_row_size(weight.type, c->file.n_embd);
    rows->bias   = (const float *) bias.data;
    return true;
}

static bool read_layer(pinfer_cold * c, int64_t il, const pinfer_origin & origin, std::string * err) {
    const std::string blk   = "blk." + std::to_string(il) + ".";
    pinfer_neurons &  layer = c->layers[(size_t) il];
    int64_t           n     = 0;
    if (!pinfer_artefact_neurons(&c->file, origin, il, &layer.ids, &n, err)) {
        return false;
    }
    if (n == 0) {
        return true; // every neuron of the layer is hot
    }
    const std::string gate_bias = blk + "ffn_gate.bias", up_bias = blk + "ffn_up.bias";
    if ((pinfer_is_gated(c->file.rule.act) && !read_rows(c, blk + "ffn_gate.weight", &gate_bias, n, &layer.gate, err)) ||
        !read_rows(c, blk + "ffn_up.weight", &up_bias, n, &layer.up, err) ||
        !read_rows(c, blk + "ffn_down_t.weight", nullptr, n, &layer.down, err)) {
        return false;
    }
    layer.n = n;
    return true;
}

bool pinfer_cold_open(pinfer_cold * c, const char * path, const pinfer_origin & origin, std::string * err) {
    if (!pinfer_artefact_open(&c->file, path, "cold", origin, err)) {
        return false;
    }
    if (!pinfer_gguf_str(c->file.gguf, "pinfer.placement.id", &c->placement_id)) {
        return pinfer_artefact_damaged(&c->file, "it lacks pinfer.placement.id", err);
    }
    c->layers.resize((size_t) c->file.n_layer);
    for (int64_t il = 0; il < c->file.n_layer; il++) {
        if (!read_layer(c, il, origin, err)) {
            return false;
        }
    }
    return true;
}
