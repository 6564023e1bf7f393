// artefact.h: a GGUF file of pinfer, mapped and checked. Reading one never aborts and never trusts a length.
#pragma once

#include "activation.h"
#include "checksum.h"
#include "ggml.h"
#include "gguf.h"
#include "header.h"
#include "pinfer.h"

#include <cstdint>
#include <string>
#include <vector>

struct pinfer_artefact {
    std::string    path;
    std::string    remake; // end of an error's line: the command that makes the file again
    gguf_context * gguf = nullptr;
    uint8_t *      map  = nullptr; // the whole file, read-only
    size_t         size = 0;
    pinfer_rule    rule; // it was made for
    std::vector<int> ffns; // numbers of the model's FFNs, in the order of the file's arrays

    pinfer_verifier verifier;

    pinfer_artefact() = default;
    pinfer_artefact(const pinfer_artefact &) = delete;
    pinfer_artefact & operator=(const pinfer_artefact &) = delete;
    ~pinfer_artefact();
};

// One tensor inside a mapped artefact; data is null when the file has none of that name.
struct pinfer_blob {
    const uint8_t * data = nullptr;
    ggml_type       type = GGML_TYPE_F32;
    int64_t         ne[GGML_MAX_DIMS] = {0, 0, 0, 0};
    size_t          size = 0; // bytes
};

// What an artefact must have been made from, and the shape that it must have.
struct pinfer_origin {
    const char *         model_path = nullptr;
    std::string          fingerprint;
    pinfer_rule          rule; // GRAPH: any
    pinfer_header        header;
};

// Maps path and checks kind, format version, what it was made from, and its shape against the model's. On failure *err says
// what happened and the command that fixes it.
bool pinfer_artefact_open(pinfer_artefact * a, const char * path, const char * kind, const pinfer_origin & origin,
                          std::string * err);

// Tensor by name; false (with *err) when its shape is not [ne0, ne1, ne2] (ne1 = 1 for vectors) or its type not `type`
// (GGML_TYPE_COUNT: any). A missing tensor is not an error: out->data stays null.
bool pinfer_artefact_tensor(const pinfer_artefact * a, const std::string & name, ggml_type type, int64_t ne0, int64_t ne1,
                            pinfer_blob * out, std::string * err, int64_t ne2 = 1);

// Gives back the memory that pages within these bytes of a mapped artefact take; they are read again when touched.
void pinfer_artefact_release(const void * data, size_t size);

// "PATH is damaged: ..." as soon as a checksum was found to differ, else empty.
std::string pinfer_artefact_damage(const pinfer_artefact * a);

// Writes "PATH is damaged: CAUSE; COMMAND" and returns false.
bool pinfer_artefact_damaged(const pinfer_artefact * a, const std::string & cause, std::string * err);

// Units of an FFN that the file holds: its neurons, or the experts of a stack, by the tensor NAME.neurons or NAME.experts: *n of
// them; 0 where the file has none. False (with *err) when they are not numbers of units of the model.
bool pinfer_artefact_units(const pinfer_artefact * a, const pinfer_origin & origin, int ffn, const int32_t ** ids, int64_t * n,
                           std::string * err);

// The text as one line: a file may have put a line break into a name. Returns false.
bool pinfer_refuse(const std::string & text, std::string * err);

// Header of a GGUF, null where it cannot be read.
gguf_context * pinfer_gguf_open(const char * path);

// Keys; false when absent or of another type. An u32 may also be stored as u16.
bool pinfer_gguf_u32(const gguf_context * gguf, const char * key, uint32_t * out);
bool pinfer_gguf_f32(const gguf_context * gguf, const char * key, float * out);
bool pinfer_gguf_str(const gguf_context * gguf, const char * key, std::string * out);
bool pinfer_gguf_u32_array(const gguf_context * gguf, const char * key, std::vector<uint32_t> * out);
bool pinfer_gguf_str_array(const gguf_context * gguf, const char * key, std::vector<std::string> * out);

// See pinfer_fingerprint() in pinfer.h; of a model by the path of its first file, or by those of all its files in order.
bool pinfer_fingerprint_files(const std::vector<std::string> & files, std::string * out, std::string * err);
bool pinfer_fingerprint_file(const char * path, std::string * out, std::string * err);
