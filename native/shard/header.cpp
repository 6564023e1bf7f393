// header.cpp: reads the header of a model's GGUF.
#include "header.h"

#include "artefact.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <unistd.h>

pinfer_part pinfer_part_of(const char * name, bool bias, int * layer) {
    int  il = -1, end = -1;
    char part[8], kind[8];
    if (sscanf(name, "blk.%9d.ffn_%4[a-z].%6[a-z]%n", &il, part, kind, &end) != 3 || name[end] != '\0' || il < 0 ||
        strcmp(kind, bias ? "bias" : "weight") != 0) {
        return PINFER_PART_NONE;
    }
    *layer = il;
    if (!strcmp(part, "up")) {
        return PINFER_PART_UP;
    }
    if (!strcmp(part, "gate")) {
        return PINFER_PART_GATE;
    }
    return !strcmp(part, "down") ? PINFER_PART_DOWN : PINFER_PART_NONE;
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
    if (ne[2] == 1 && ne[3] == 1) {
        m = {.ne     = {ne[0], ne[1]},
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

static void read_tensors(const gguf_context * gguf, size_t file, pinfer_header * h) {
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        const char * const name  = gguf_get_tensor_name(gguf, i);
        int                layer = -1;
        const pinfer_part  part  = pinfer_part_of(name, false, &layer);
        if (part != PINFER_PART_NONE && (size_t) layer < h->layers.size()) {
            const_cast<pinfer_matrix &>(h->layers[(size_t) layer].part(part)) = matrix_of(gguf, file, i);
        } else if (!strcmp(name, "token_embd.weight")) {
            h->token_embd = matrix_of(gguf, file, i);
        }
    }
}

static bool read_layers(const std::vector<pinfer_gguf_ptr> & files, const char * path, pinfer_header * h, std::string * err) {
    const gguf_context * const gguf = files[0].get();
    uint32_t                   n_layer = 0, n_embd = 0;
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
    h->n_embd = n_embd;
    h->layers.resize(n_layer);
    for (size_t i = 0; i < files.size(); i++) {
        read_tensors(files[i].get(), i, h);
    }
    for (uint32_t il = 0; il < n_layer; il++) {
        const pinfer_layer_header & l    = h->layers[il];
        const bool                  gate = l.gate.ne[1] == 0 || (l.gate.ne[0] == n_embd && l.gate.ne[1] == l.n_ff());
        const bool                  both = l.up.ne[0] == n_embd && l.down.ne[0] == l.n_ff() && l.down.ne[1] == n_embd;
        const bool                  none = l.n_ff() == 0 && l.gate.ne[1] == 0;
        if (!(gate && both) && !none) {
            h->layers[il] = {}; // an FFN of another kind, which the plugin does not claim
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
    return read_activation(files[0].get(), path, out, err) && read_layers(files, path, out, err);
}
