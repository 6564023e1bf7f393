// model_file.h: what can be known of a GGUF without loading it, and whether it is whole.
//
// libllama maps the tensors where the header says they are: a file that was cut short would kill the process at the
// first touch of a missing page. So the extents are compared with the file's size before libllama sees it.
#pragma once

#include "gguf.h"

#include <cstdint>
#include <string>

struct pinfer_model_file {
    std::string path;
    std::string arch;        // general.architecture
    std::string activation;  // pinfer.ffn.activation, empty when the model does not say it
    float       threshold = 0.0f;  // pinfer.ffn.activation_threshold
    uint32_t    n_split = 1; // files a split GGUF has
};

// Reads and checks the header. On failure returns false and writes cause and remedy into err.
bool pinfer_model_file_open(const std::string & path, pinfer_model_file & model, std::string & err);

// The same check for any GGUF; NULL on failure. `remedy` ends the message ("fetch it again"). Free it with gguf_free().
struct gguf_context * pinfer_gguf_open(const std::string & path, const std::string & remedy, std::string & err);

// Values of a header; the fallback when the key is absent or of another type.
std::string pinfer_gguf_string(const struct gguf_context * gguf, const char * key, const std::string & fallback);
uint64_t    pinfer_gguf_uint(const struct gguf_context * gguf, const char * key, uint64_t fallback);
