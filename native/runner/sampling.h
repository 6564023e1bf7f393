// sampling.h: from the logits of the last token to the next one.
#pragma once

#include "arguments.h"
#include "session.h"

#include <string>
#include <vector>

struct pinfer_sampler {
    struct llama_sampler *        chain   = nullptr;
    struct llama_sampler *        grammar = nullptr;
    std::vector<llama_token_data> candidates;
};

// The seed to use: the user's, or a random one for -1.
uint32_t pinfer_seed_choose(int64_t seed);

// A sampler for one answer. `grammar` is GBNF, empty for none. On failure returns false and writes the cause into err.
bool pinfer_sampler_create(const pinfer_arguments & args, const std::string & grammar, uint32_t seed,
                           const pinfer_session & session, pinfer_sampler & sampler, std::string & err);
void pinfer_sampler_free(pinfer_sampler & sampler);

// Shows the prompt to the penalties.
void pinfer_sampler_see(pinfer_sampler & sampler, const std::vector<llama_token> & prompt);

// Next token, or false with the cause in err when the logits are not numbers.
bool pinfer_sampler_next(pinfer_sampler & sampler, const pinfer_session & session, llama_token & token,
                         std::string & err);
