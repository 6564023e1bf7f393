// cold.cpp: reads cold.gguf in place.
#include "cold.h"

#include "pinfer.h"

// A matrix with a row of n_embd for each of n neurons, and their biases (null: they have none), which may be absent.
static bool read_rows(const pinfer_cold * c, const std::string & name, const std::string * bias_name, int64_t n_embd, int64_t n,
                      pinfer_rows * rows, std::string * err) {
    pinfer_blob weight, bias;
    if (!pinfer_artefact_tensor(&c->file, name, GGML_TYPE_COUNT, n_embd, n, &weight, err) ||
        (bias_name && !pinfer_artefact_tensor(&c->file, *bias_name, GGML_TYPE_F32, n, 1, &bias, err))) {
        return false;
    }
    if (!weight.data) {
        return pinfer_artefact_damaged(&c->file, "it has no tensor " + name, err);
    }
    rows->kernel = pinfer_kernel_get(weight.type);
    if (!rows->kernel || n_embd % ggml_blck_size(weight.type) != 0) {
        return pinfer_artefact_damaged(&c->file, name + " is of type " + ggml_type_name(weight.type) + ", which no FFN has", err);
    }
    rows->data   = weight.data;
    rows->stride = ggml_row_size(weight.type, n_embd);
    rows->bias   = (const float *) bias.data;
    return true;
}

static bool read_ffn(pinfer_cold * c, int ffn, const pinfer_origin & origin, std::string * err) {
    const std::string         name   = pinfer_ffn_name(ffn);
    const pinfer_ffn_header & header = origin.header.ffns[(size_t) ffn];
    const int64_t             n_embd = header.n_embd();
    pinfer_neurons &          f      = c->ffns[(size_t) ffn];
    int64_t                   n      = 0;
    if (!pinfer_artefact_units(&c->file, origin, ffn, &f.ids, &n, err)) {
        return false;
    }
    if (n == 0) {
        return true; // all of it is hot
    }
    if (pinfer_ffn_kind_of(ffn) == PINFER_FFN_EXPERTS) {
        if (!read_rows(c, name + ".ffn_down_t.weight", nullptr, n_embd, n * header.n_ff(), &f.down, err)) {
            return false;
        }
        f.place.assign((size_t) header.n_experts(), -1);
        for (int64_t j = 0; j < n; j++) {
            f.place[(size_t) f.ids[j]] = j * header.n_ff();
        }
        f.n = n;
        return true;
    }
    const std::string gate_bias = name + ".ffn_gate.bias", up_bias = name + ".ffn_up.bias";
    if ((pinfer_is_gated(c->file.rule.act) && !read_rows(c, name + ".ffn_gate.weight", &gate_bias, n_embd, n, &f.gate, err)) ||
        !read_rows(c, name + ".ffn_up.weight", &up_bias, n_embd, n, &f.up, err) ||
        !read_rows(c, name + ".ffn_down_t.weight", nullptr, n_embd, n, &f.down, err)) {
        return false;
    }
    f.n = n;
    return true;
}

bool pinfer_cold_open(pinfer_cold * c, const char * path, const pinfer_origin & origin, std::string * err) {
    if (!pinfer_artefact_open(&c->file, path, "cold", origin, err)) {
        return false;
    }
    if (!pinfer_gguf_str(c->file.gguf, "pinfer.placement.id", &c->placement_id)) {
        return pinfer_artefact_damaged(&c->file, "it lacks pinfer.placement.id", err);
    }
    c->ffns.resize(origin.header.ffns.size());
    for (const int ffn : c->file.ffns) {
        if (!read_ffn(c, ffn, origin, err)) {
            return false;
        }
    }
    return true;
}
