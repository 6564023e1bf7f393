// header.h: what the GGUF of a model says about its FFNs. Reading one never aborts and never trusts a number.
#pragma once

#include "ggml.h"
#include "gguf.h"
#include "pinfer.h"

#include <cstdint>
#include <string>
#include <vector>

// A matrix of the file; ne[1] is 0 where the model has none.
struct pinfer_matrix {
    int64_t   ne[2] = {0, 0};
    ggml_type type  = GGML_TYPE_F32;
    size_t    offset = 0; // of its data in the file

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
    std::string                      arch;
    int64_t                          n_embd = 0;
    std::vector<pinfer_layer_header> layers;
    pinfer_matrix                    token_embd;
    bool                             is_split = false; // one part of several files
    pinfer_activation                graph_activation = PINFER_ACT_OTHER; // what llama.cpp computes for the architecture
    pinfer_activation                activation = PINFER_ACT_OTHER;       // what the model means: its own key, else the same
    float                            threshold = 0.0f;
};

// False, with *err, where the file is not the GGUF of a model or contradicts itself.
bool pinfer_header_read(const char * path, pinfer_header * out, std::string * err);
