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

// A matrix of the model, or one for each expert; ne[1] is 0 where it has none.
struct pinfer_matrix {
    int64_t   ne[3] = {0, 0, 1};
    ggml_type type  = GGML_TYPE_F32;
    size_t    file   = 0; // of the model's files
    size_t    offset = 0; // of its data in that file

    bool is(const ggml_tensor * t) const {
        return ne[1] > 0 && t->ne[0] == ne[0] && t->ne[1] == ne[1] && t->ne[2] == ne[2] && t->ne[3] == 1 && t->type == type;
    }
};

enum pinfer_part { PINFER_PART_NONE, PINFER_PART_GATE, PINFER_PART_UP, PINFER_PART_DOWN };

// The FFN of a layer, the one that all tokens share beside its experts, or all of its experts as one stack.
enum pinfer_ffn_kind { PINFER_FFN_DENSE, PINFER_FFN_SHARED, PINFER_FFN_EXPERTS, PINFER_FFN_KINDS };

// FFNs are numbered whether a model has them or not.
inline int pinfer_ffn_index(int layer, pinfer_ffn_kind kind) {
    return layer * PINFER_FFN_KINDS + kind;
}
inline int pinfer_ffn_layer(int ffn) {
    return ffn / PINFER_FFN_KINDS;
}
inline pinfer_ffn_kind pinfer_ffn_kind_of(int ffn) {
    return (pinfer_ffn_kind) (ffn % PINFER_FFN_KINDS);
}
// What the names of its tensors in artefacts begin with: "blk.7", "blk.7.shexp", "blk.7.exps".
std::string pinfer_ffn_name(int ffn);
// For messages: "layer 7", "the shared expert of layer 7", "the experts of layer 7".
std::string pinfer_ffn_title(int ffn);

// Part and FFN that the GGUF name of an FFN weight or bias ("blk.7.ffn_up.weight") stands for; NONE for any other name.
pinfer_part pinfer_part_of(const char * name, bool bias, int * ffn);

// An FFN; one that the model does not have has no up matrix. Neuron i of expert e has the number e*n_ff + i.
struct pinfer_ffn_header {
    pinfer_matrix gate, up, down;
    bool          normed = false; // a norm lies between the activation and the down product (BitNet)

    int64_t                n_embd() const { return up.ne[0]; }
    int64_t                n_ff() const { return up.ne[1]; } // of one expert in a stack
    int64_t                n_experts() const { return up.ne[2]; } // 1 unless it is a stack
    int64_t                n_neurons() const { return up.ne[1] * up.ne[2]; }
    const pinfer_matrix & part(pinfer_part p) const {
        return p == PINFER_PART_GATE ? gate : p == PINFER_PART_UP ? up : down;
    }
};

struct pinfer_header {
    std::vector<std::string>         files; // of the model, by their paths: one, or all parts of a split model in order
    std::string                      arch;
    int64_t                          n_embd = 0;
    std::vector<pinfer_ffn_header>   ffns; // by their number
    int64_t                          n_expert_used = 0; // the most in a layer; 0: not known
    std::string                      obstacle; // the first FFN of the model that is not among them, and why; empty: all are
    int64_t                          n_unclaimed = 0; // FFNs that are not
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

// Forgets the FFNs that are no stacks of experts: where nothing is zero they are llama.cpp's.
void pinfer_header_keep_stacks(pinfer_header * h);

// False, with *err, where the file is not the GGUF of a model, or not the first of its parts, or contradicts itself.
bool pinfer_header_read(const char * path, pinfer_header * out, std::string * err,
                        const pinfer_parts_find & find = pinfer_parts_by_name);
