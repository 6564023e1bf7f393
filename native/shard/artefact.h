// artefact.h: a GGUF file of pinfer, mapped and checked. Reading one never aborts and never trusts a length.
#pragma once

#include "ggml.h"
#include "gguf.h"
#include "pinfer.h"

#include <cstdint>
#include <string>
#include <vector>

struct pinfer_artefact {
    std::string    path;
    std::string    remake; // end of an error's line: the command that makes the file anew
    gguf_context * gguf = nullptr;
    uint8_t *      map  = nullptr; // the whole file, read-only
    size_t         size = 0;

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

// What an artefact must have been made from.
struct pinfer_origin {
    const char *      model_path = nullptr;
    std::string       fingerprint;
    pinfer_activation activation = PINFER_ACT_GRAPH; // GRAPH: any
    float             threshold = 0.0f;
};

// Maps path and checks kind, format version and what it was made from. On failure *err says the cause and the command
// that mends it.
bool pinfer_artefact_open(pinfer_artefact * a, const char * path, const char * kind, const pinfer_origin & origin,
                          std::string * err);

// Tensor by name; false (with *err) when its shape is not [ne0, ne1] (ne1 = 1 for vectors) or its type not `type`
// (GGML_TYPE_COUNT: any). A missing tensor is not an error: out->data stays null.
bool pinfer_artefact_tensor(const pinfer_artefact * a, const char * name, ggml_type type, int64_t ne0, int64_t ne1,
                            pinfer_blob * out, std::string * err);

// Gives back the memory that pages within these bytes of a mapped artefact take; they are read anew when touched.
void pinfer_artefact_release(const void * data, size_t size);

// Keys; false when absent or of another type.
bool pinfer_artefact_u32(const pinfer_artefact * a, const char * key, uint32_t * out);
bool pinfer_artefact_f32(const pinfer_artefact * a, const char * key, float * out);
bool pinfer_artefact_str(const pinfer_artefact * a, const char * key, std::string * out);
bool pinfer_artefact_u32_array(const pinfer_artefact * a, const char * key, std::vector<uint32_t> * out);
bool pinfer_artefact_str_array(const pinfer_artefact * a, const char * key, std::vector<std::string> * out);

// See pinfer_fingerprint() in pinfer.h.
bool pinfer_fingerprint_file(const char * path, std::string * out, std::string * err);
