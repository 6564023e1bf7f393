// predictor.cpp: reads predictor.gguf; its arithmetic runs inside the FFN executor, which knows the threads.
#include "predictor.h"

static bool read_layer(pinfer_predictor * p, int il, const std::string & kind, int64_t rank, int64_t n_embd,
                       int64_t n_ff, std::string * err) {
    pinfer_predictor_layer & layer = p->layers[(size_t) il];
    if (kind == "none") {
        return true;
    }
    if (kind != "low_rank" && kind != "mlp") {
        *err = p->file.path + ": unknown predictor kind '" + kind + "'; make it anew with: pinfer train";
        return false;
    }
    const std::string blk = "blk." + std::to_string(il) + ".";
    pinfer_blob       a, b, t;
    if (!pinfer_artefact_tensor(&p->file, (blk + "pred_a").c_str(), GGML_TYPE_COUNT, n_embd, rank, &a, err) ||
        !pinfer_artefact_tensor(&p->file, (blk + "pred_b").c_str(), GGML_TYPE_COUNT, rank, n_ff, &b, err) ||
        !pinfer_artefact_tensor(&p->file, (blk + "pred_t").c_str(), GGML_TYPE_F32, n_ff, 1, &t, err)) {
        return false;
    }
    layer.a_kernel = a.data ? pinfer_kernel_get(a.type) : nullptr;
    layer.b_kernel = b.data ? pinfer_kernel_get(b.type) : nullptr;
    if (!layer.a_kernel || !layer.b_kernel || !t.data) {
        *err = p->file.path + ": layer " + std::to_string(il) + " is incomplete; make it anew with: pinfer train";
        return false;
    }
    layer.rank  = rank;
    layer.relu  = kind == "mlp";
    layer.a     = a.data;
    layer.b     = b.data;
    layer.t     = (const float *) t.data;
    layer.a_row = ggml_row_size(a.type, n_embd);
    layer.b_row = ggml_row_size(b.type, rank);
    return true;
}

bool pinfer_predictor_open(pinfer_predictor * p, const char * path, const char * model_path, const char * fingerprint,
                           std::string * err) {
    if (!pinfer_artefact_open(&p->file, path, "predictor", model_path, fingerprint, err)) {
        return false;
    }
    uint32_t                 n_layer = 0, n_embd = 0, n_ff = 0;
    std::vector<std::string> kind;
    std::vector<uint32_t>    rank;
    if (!pinfer_artefact_u32(&p->file, "pinfer.n_layer", &n_layer) ||
        !pinfer_artefact_u32(&p->file, "pinfer.n_embd", &n_embd) ||
        !pinfer_artefact_u32(&p->file, "pinfer.n_ff", &n_ff) ||
        !pinfer_artefact_str_array(&p->file, "pinfer.predictor.kind", &kind) ||
        !pinfer_artefact_u32_array(&p->file, "pinfer.predictor.rank", &rank) || kind.size() != n_layer ||
        rank.size() != n_layer) {
        *err = std::string(path) + " lacks a key; make it anew with: pinfer train " + model_path;
        return false;
    }
    p->layers.resize(n_layer);
    for (uint32_t il = 0; il < n_layer; il++) {
        if (!read_layer(p, (int) il, kind[il], rank[il], n_embd, n_ff, err)) {
            return false;
        }
    }
    return true;
}
