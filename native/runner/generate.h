// generate.h: one answer, token by token.
#pragma once

#include "sampling.h"
#include "session.h"
#include "text.h"

#include <string>
#include <vector>

enum pinfer_stop {
    PINFER_STOP_EOG,        // the model ended it
    PINFER_STOP_LENGTH,     // -n tokens
    PINFER_STOP_CONTEXT,    // the context is full
    PINFER_STOP_INTERRUPT,  // Ctrl-C
    PINFER_STOP_CLOSED,     // nobody reads stdout any more
    PINFER_STOP_FAILED,     // answer.error says why
};

struct pinfer_answer {
    std::vector<llama_token> tokens;  // without the one that ends it
    std::string              text;    // their bytes as they came, maybe not UTF-8
    enum pinfer_stop         stop = PINFER_STOP_EOG;
    std::string              error;
};

// Decodes the prompt (at least one token), then samples up to n_predict tokens (-1: no limit), writing them to stdout
// as they become whole characters when `stream` is set.
void pinfer_generate(pinfer_session & session, pinfer_sampler & sampler, const std::vector<llama_token> & prompt,
                     int32_t n_predict, bool stream, pinfer_answer & answer);

const char * pinfer_stop_name(enum pinfer_stop stop);
