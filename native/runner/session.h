// session.h: a loaded model, its context, and the tokens that lie in its KV cache.
#pragma once

#include "arguments.h"
#include "artefacts.h"
#include "devices.h"
#include "llama.h"
#include "model_file.h"

#include <string>
#include <vector>

enum pinfer_mode {
    PINFER_MODE_DENSE,      // stock libllama
    PINFER_MODE_EXACT,      // every neuron's first product, then only the active ones
    PINFER_MODE_PREDICTED,  // only candidates
};

enum pinfer_decode_result {
    PINFER_DECODE_OK,
    PINFER_DECODE_INTERRUPTED,
    PINFER_DECODE_FULL,    // no room in the KV cache
    PINFER_DECODE_FAILED,  // session.error says why
};

struct pinfer_session {
    pinfer_model_file          file;
    pinfer_artefacts           artefacts;
    enum pinfer_mode           mode    = PINFER_MODE_DENSE;
    struct llama_model *       model   = nullptr;
    struct llama_context *     context = nullptr;
    const struct llama_vocab * vocab   = nullptr;
    uint32_t                   n_ctx   = 0;  // tokens that may be used
    std::vector<llama_token>   tokens;       // what lies in the KV cache, in order
    std::string                error;
    std::vector<std::string>   notes;        // what the user should know about the way the model runs

    // speed: prompt tokens and generated tokens are told apart by who asks for the decode
    uint64_t n_prompt = 0, n_generated = 0;
    double   t_prompt = 0.0, t_generated = 0.0;  // seconds

    pinfer_devices devices;
    pinfer_vram    vram_loaded;  // when model and context had been loaded
};

// Loads model, plugin and artefacts. Returns the exit code: 0, 1 or 2, with session.error set when it is not 0.
int  pinfer_session_open(const pinfer_arguments & args, pinfer_session & session);
void pinfer_session_close(pinfer_session & session);

// Tokens of a text. add_special: BOS and EOS as the vocabulary says. Special tokens in the text are recognised.
bool        pinfer_session_tokenize(const pinfer_session & session, const std::string & text, bool add_special,
                                    std::vector<llama_token> & tokens);
std::string pinfer_session_piece(const pinfer_session & session, llama_token token);
bool        pinfer_session_has_token(const pinfer_session & session, const char * text);  // one token of the vocabulary

// How many tokens at the beginning of `prompt` already lie in the KV cache.
size_t pinfer_session_common(const pinfer_session & session, const std::vector<llama_token> & prompt);

// Makes the KV cache hold exactly `prompt`, decoding only what differs from what lies there, with the logits of its
// last token ready. After an interruption session.tokens says how far it came.
enum pinfer_decode_result pinfer_session_sync(pinfer_session & session, const std::vector<llama_token> & prompt);

// Appends one generated token.
enum pinfer_decode_result pinfer_session_append(pinfer_session & session, llama_token token);

// Device memory this process took since it was opened, and what it may take; false without a device.
bool pinfer_session_vram(const pinfer_session & session, pinfer_vram & vram);
