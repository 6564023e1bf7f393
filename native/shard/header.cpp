// header.cpp: reads the header of a model's GGUF.
#include "header.h"

#include "artefact.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <unistd.h>

namespace {

struct weight_name {
    const char *    text;
    pinfer_part     part;
    pinfer_ffn_kind kind;
};

const weight_name weight_names[] = {
    {"ffn_gate", PINFER_PART_GATE, PINFER_FFN_DENSE},         {"ffn_up", PINFER_PART_UP, PINFER_FFN_DENSE},
    {"ffn_down", PINFER_PART_DOWN, PINFER_FFN_DENSE},         {"ffn_gate_shexp", PINFER_PART_GATE, PINFER_FFN_SHARED},
    {"ffn_up_shexp", PINFER_PART_UP, PINFER_FFN_SHARED},      {"ffn_down_shexp", PINFER_PART_DOWN, PINFER_FFN_SHARED},
    {"ffn_gate_exps", PINFER_PART_GATE, PINFER_FFN_EXPERTS},  {"ffn_up_exps", PINFER_PART_UP, PINFER_FFN_EXPERTS},
    {"ffn_down_exps", PINFER_PART_DOWN, PINFER_FFN_EXPERTS},  {"channel_mix_key", PINFER_PART_UP, PINFER_FFN_DENSE},
    {"channel_mix_value", PINFER_PART_DOWN, PINFER_FFN_DENSE}, // RWKV
};

} // namespace

// Part of an FFN that a tensor is, by a name like "blk.7.ffn_up.END".
static pinfer_part part_of(const char * name, const char * wanted_end, int * ffn) {
    int  layer = -1, length = -1;
    char text[24], end[8];
    if (sscanf(name, "blk.%6d.%23[a-z_].%7[a-z]%n", &layer, text, end, &length) != 3 || name[length] != '\0' || layer < 0 ||
        strcmp(end, wanted_end) != 0) {
        return PINFER_PART_NONE;
    }
    for (const weight_name & w : weight_names) {
        if (!strcmp(text, w.text)) {
            *ffn = pinfer_ffn_index(layer, w.kind);
            return w.part;
        }
    }
    return PINFER_PART_NONE;
}

pinfer_part pinfer_part_of(const char * name, bool bias, int * ffn) {
    return part_of(name, bias ? "bias" : "weight", ffn);
}

// The layer whose norm between the activation and the down product a tensor is the weight of; -1: it is not.
static int layer_of_norm(const char * name) {
    int layer = -1, length = 0;
    return sscanf(name, "blk.%6d.ffn_sub_norm.weight%n", &layer, &length) == 1 && length > 0 && name[length] == '\0' ? layer : -1;
}

std::string pinfer_ffn_name(int ffn) {
    static const char * const ends[] = {"", ".shexp", ".exps"};
    return "blk." + std::to_string(pinfer_ffn_layer(ffn)) + ends[pinfer_ffn_kind_of(ffn)];
}

std::string pinfer_ffn_title(int ffn) {
    static const char * const begins[] = {"", "the shared expert of ", "the experts of "};
    return begins[pinfer_ffn_kind_of(ffn)] + ("layer " + std::to_string(pinfer_ffn_layer(ffn)));
}

static bool refuse(const char * path, const std::string & why, std::string * err) {
    return pinfer_refuse(std::string(path) + " " + why, err);
}

bool pinfer_parts_by_name(uint32_t n, std::vector<std::string> * files, std::string * err) {
    const std::string first = files->front();
    char              number[32];
    snprintf(number, sizeof(number), "-%05d-of-%05u.gguf", 1, n);
    if (!first.ends_with(number)) {
        return refuse(first.c_str(), std::string("is a part of a model, but its name does not end in ") + number + "; rename it", err);
    }
    const std::string stem = first.substr(0, first.size() - strlen(number));
    for (uint32_t i = 2; i <= n; i++) {
        snprintf(number, sizeof(number), "-%05u-of-%05u.gguf", i, n);
        files->push_back(stem + number);
        if (access(files->back().c_str(), F_OK) != 0) {
            return refuse(files->back().c_str(), "is missing, one of the " + std::to_string(n) +
                                                     " parts of the model; put all parts into one folder", err);
        }
    }
    return true;
}

bool pinfer_model_files(const gguf_context * gguf, const char * path, const pinfer_parts_find & find,
                        std::vector<std::string> * files, std::string * err) {
    uint32_t n = 1, i = 0;
    pinfer_gguf_u32(gguf, "split.count", &n); // also an u16
    pinfer_gguf_u32(gguf, "split.no", &i);
    if (n > 1 && i > 0) {
        return refuse(path, "is part " + std::to_string(i + 1ull) + " of " + std::to_string(n) + " of a model; name the first part", err);
    }
    *files = {path};
    return n <= 1 || find(n, files, err);
}

static pinfer_matrix matrix_of(const gguf_context * gguf, size_t file, int64_t tensor) {
    const int64_t * ne = gguf_get_tensor_ne(gguf, tensor);
    pinfer_matrix   m;
    if (ne[3] == 1) {
        m = {.ne     = {ne[0], ne[1], ne[2]},
             .type   = gguf_get_tensor_type(gguf, tensor),
             .file   = file,
             .offset = gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, tensor)};
    }
    return m;
}

static bool read_activation(const gguf_context * gguf, const char * path, pinfer_header * h, std::string * err) {
    h->graph_activation = h->activation = pinfer_arch_activation(h->arch.c_str());
    std::string name;
    if (pinfer_gguf_str(gguf, "pinfer.ffn.activation", &name)) {
        h->activation = pinfer_activation_parse(name.c_str());
        if (h->activation == PINFER_ACT_GRAPH) {
            return refuse(path, "says pinfer.ffn.activation = '" + name + "', which this pinfer does not know; convert the model again",
                          err);
        }
    }
    if (pinfer_gguf_f32(gguf, "pinfer.ffn.activation_threshold", &h->threshold) &&
        (!std::isfinite(h->threshold) || h->threshold < 0.0f)) {
        return refuse(path, "has an activation threshold that is negative or not a number; convert the model again", err);
    }
    return true;
}

// Whether the matrices belong together; else *why says what is wrong with them.
static bool is_whole(const pinfer_ffn_header & f, int ffn, int64_t n_embd, std::string * why) {
    const bool    is_stack = pinfer_ffn_kind_of(ffn) == PINFER_FFN_EXPERTS;
    const int64_t width    = f.n_embd(), n_ff = f.n_ff(), n = f.n_experts();
    const auto    is       = [n](const pinfer_matrix & m, int64_t ne0, int64_t ne1) {
        return m.ne[0] == ne0 && m.ne[1] == ne1 && m.ne[2] == n;
    };
    if (n_ff == 0 || f.down.ne[1] == 0) {
        *why = "no up or down matrix of its own";
    } else if ((f.gate.ne[1] > 0 && !is(f.gate, width, n_ff)) || !is(f.down, n_ff, width) ||
               (!is_stack && (n != 1 || width != n_embd))) {
        *why = "matrices of different shapes";
    }
    return why->empty();
}

static void read_tensors(const gguf_context * gguf, size_t file, pinfer_header * h, std::vector<std::string> * why) {
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        const char * const name = gguf_get_tensor_name(gguf, i);
        int                ffn  = -1;
        const pinfer_part  part = pinfer_part_of(name, false, &ffn);
        if (part != PINFER_PART_NONE && (size_t) ffn < h->ffns.size()) {
            const_cast<pinfer_matrix &>(h->ffns[(size_t) ffn].part(part)) = matrix_of(gguf, file, i);
        } else if (!strcmp(name, "token_embd.weight")) {
            h->token_embd = matrix_of(gguf, file, i);
        } else if (layer_of_norm(name) >= 0 && (size_t) layer_of_norm(name) < h->ffns.size() / PINFER_FFN_KINDS) {
            h->ffns[(size_t) pinfer_ffn_index(layer_of_norm(name), PINFER_FFN_DENSE)].normed = true;
        } else if (part_of(name, "scale", &ffn) != PINFER_PART_NONE && (size_t) ffn < why->size()) {
            (*why)[(size_t) ffn] = "scales of their own";
        } else if (pinfer_part_of(name, true, &ffn) != PINFER_PART_NONE && (size_t) ffn < why->size() &&
                   pinfer_ffn_kind_of(ffn) == PINFER_FFN_EXPERTS && h->activation != PINFER_ACT_OTHER) {
            (*why)[(size_t) ffn] = "biases";
        }
    }
}

static bool read_ffns(const std::vector<pinfer_gguf_ptr> & files, const char * path, pinfer_header * h, std::string * err) {
    const gguf_context * const gguf = files[0].get();
    uint32_t                   n_layer = 0, n_embd = 0, n_drafting = 0; // layers that libllama does not run
    int64_t                    n_tensors = 0;
    for (const pinfer_gguf_ptr & file : files) {
        n_tensors += gguf_get_n_tensors(file.get());
    }
    if (!pinfer_gguf_u32(gguf, (h->arch + ".block_count").c_str(), &n_layer) ||
        !pinfer_gguf_u32(gguf, (h->arch + ".embedding_length").c_str(), &n_embd)) {
        return refuse(path, "lacks " + h->arch + ".block_count or " + h->arch + ".embedding_length, so it is not a model", err);
    }
    if (n_layer > n_tensors) {
        return refuse(path, "says it has " + std::to_string(n_layer) + " layers, but it has only " + std::to_string(n_tensors) +
                                " tensors; it is damaged", err);
    }
    pinfer_gguf_u32(gguf, (h->arch + ".nextn_predict_layers").c_str(), &n_drafting);
    n_layer -= std::min(n_layer, n_drafting);
    uint32_t              n_used = 0;
    std::vector<uint32_t> n_used_of; // each layer
    if (pinfer_gguf_u32(gguf, (h->arch + ".expert_used_count").c_str(), &n_used)) {
        h->n_expert_used = n_used;
    } else if (pinfer_gguf_u32_array(gguf, (h->arch + ".expert_used_count").c_str(), &n_used_of) && !n_used_of.empty()) {
        h->n_expert_used = *std::max_element(n_used_of.begin(), n_used_of.end());
    }
    h->n_embd = n_embd;
    h->ffns.resize((size_t) n_layer * PINFER_FFN_KINDS);
    std::vector<std::string> why(h->ffns.size());
    for (size_t i = 0; i < files.size(); i++) {
        read_tensors(files[i].get(), i, h, &why);
    }
    for (size_t i = 0; i < h->ffns.size(); i++) {
        pinfer_ffn_header & f = h->ffns[i];
        const bool          none = f.gate.ne[1] == 0 && f.up.ne[1] == 0 && f.down.ne[1] == 0;
        if (!none && (!why[i].empty() || !is_whole(f, (int) i, n_embd, &why[i]))) {
            f           = {}; // of another kind, which the plugin does not claim
            h->obstacle = h->obstacle.empty() ? pinfer_ffn_title((int) i) + " with " + why[i] : h->obstacle;
            h->n_unclaimed++;
        }
    }
    return true;
}

bool pinfer_header_read(const char * path, pinfer_header * out, std::string * err, const pinfer_parts_find & find) {
    *out = {};
    std::vector<pinfer_gguf_ptr> files;
    files.emplace_back(pinfer_gguf_open(path));
    if (!files[0]) {
        return refuse(path, "is not a GGUF file, or its header is damaged; check the file", err);
    }
    if (!pinfer_model_files(files[0].get(), path, find, &out->files, err)) {
        return false;
    }
    for (size_t i = 1; i < out->files.size(); i++) {
        files.emplace_back(pinfer_gguf_open(out->files[i].c_str()));
        if (!files[i]) {
            return refuse(out->files[i].c_str(), "is not a GGUF file, or its header is damaged; download this part again", err);
        }
    }
    if (!pinfer_gguf_str(files[0].get(), "general.architecture", &out->arch)) {
        return refuse(path, "lacks general.architecture, so it is not a model", err);
    }
    return read_activation(files[0].get(), path, out, err) && read_ffns(files, path, out, err);
}

void pinfer_header_keep_stacks(pinfer_header * h) {
    for (size_t i = 0; i < h->ffns.size(); i++) {
        if (pinfer_ffn_kind_of((int) i) != PINFER_FFN_EXPERTS) {
            h->ffns[i] = {};
        }
    }
}
