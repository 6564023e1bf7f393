// header.h: what the GGUF of a model says about its FFNs. Reading one never aborts and never trusts a number.
#pragma once

#include "ggml.h"
#include "gguf.h"
#include "pinfer.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct pinfer_gguf_free {
    void operator()(gguf_context * gguf) const { gguf_free(gguf); }
};

using pinfer_gguf_ptr = std::unique_ptr<gguf_context, pinfer_gguf_free>;

// A matrix of the model; ne[1] is 0 where it has none.
struct pinfer_matrix {
    int64_t   ne[2] = {0, 0};
    ggml_type type  = GGML_TYPE_F32;
    size_t    file   = 0; // of the model's files
    size_t    offset = 0; // of its data in that file

    bool is(const ggml_tensor * t) const {
        return ne[1] > 0 && t->ne[0] == ne[0] && t->ne[1] == ne[1] && t->ne[2] == 1 && t->ne[3] == 1 && t->type == type;
    }
};

enum pinfer_part { PINFER_PART_NONE, PINFER_PART_GATE, PINFER_PART_UP, PINFER_PART_DOWN };

// Part and layer that the GGUF name of an FFN weight or bias ("blk.7.ffn_up.weight") stands for; NONE for any other name.
pinfer_part pinfer_part_of(const char * name, bool bias, int * layer);

// The dense FFN of a layer; a layer without one (a mixture of experts, attention alone) has no up matrix.
struct pinfer_layer_header {
    pinfer_matrix gate, up, down;

    int64_t                n_ff() const { return up.ne[1]; }
    const pinfer_matrix & part(pinfer_part p) const {
        return p == PINFER_PART_GATE ? gate : p == PINFER_PART_UP ? up : down;
    }
};

struct pinfer_header {
    std::vector<std::string>         files; // of the model, by their paths: one, or all parts of a split model in order
    std::string                      arch;
    int64_t                          n_embd = 0;
    std::vector<pinfer_layer_header> layers;
    pinfer_matrix                    token_embd;
    pinfer_activation                graph_activation = PINFER_ACT_OTHER; // what llama.cpp computes for the architecture
    pinfer_activation                activation = PINFER_ACT_OTHER;       // what the model means: its own key, else the same
    float                            threshold = 0.0f;
};

// Appends the paths of the further parts to *files, which holds that of the first of n parts.
using pinfer_parts_find = std::function<bool(uint32_t n, std::vector<std::string> * files, std::string * err)>;

// Beside the first part, by their names, as llama.cpp does.
bool pinfer_parts_by_name(uint32_t n, std::vector<std::string> * files, std::string * err);

// The files of the model whose header was read from path; an error where that is a part, but not the first.
bool pinfer_model_files(const gguf_context * gguf, const char * path, const pinfer_parts_find & find,
                        std::vector<std::string> * files, std::string * err);

// False, with *err, where the file is not the GGUF of a model, or not the first of its parts, or contradicts itself.
bool pinfer_header_read(const char * path, pinfer_header * out, std::string * err,
                        const pinfer_parts_find & find = pinfer_parts_by_name);
