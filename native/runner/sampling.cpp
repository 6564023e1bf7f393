// sampling.cpp: libllama's samplers in the order llama.cpp's tools chain them.
#include "sampling.h"

#include "log.h"

#include <cmath>
#include <random>

uint32_t pinfer_seed_choose(int64_t seed) {
    if (seed >= 0 && (uint32_t) seed != LLAMA_DEFAULT_SEED) {
        return (uint32_t) seed;
    }
    std::random_device random;
    return random() & 0x7FFFFFFFu;
}

// Tokens that must never be sampled: those the model suppresses, and with --ignore-eos those that end a text.
static std::vector<llama_logit_bias> forbidden_tokens(const pinfer_arguments & args, const struct llama_vocab * vocab) {
    std::vector<llama_logit_bias> bias;
    int32_t                       n_suppressed = 0;
    const llama_token *           suppressed   = llama_vocab_get_suppress_tokens(vocab, &n_suppressed);
    for (int32_t i = 0; suppressed && i < n_suppressed; i++) {
        bias.push_back({ suppressed[i], -INFINITY });
    }
    for (llama_token token = 0; args.ignore_eos && token < llama_vocab_n_tokens(vocab); token++) {
        if (llama_vocab_is_eog(vocab, token)) {
            bias.push_back({ token, -INFINITY });
        }
    }
    return bias;
}

bool pinfer_sampler_create(const pinfer_arguments & args, const std::string & grammar, uint32_t seed,
                           const pinfer_session & session, pinfer_sampler & sampler, std::string & err) {
    const int32_t n_vocab = llama_vocab_n_tokens(session.vocab);
    sampler.chain         = llama_sampler_chain_init(llama_sampler_chain_default_params());

    const std::vector<llama_logit_bias> bias = forbidden_tokens(args, session.vocab);
    if (!bias.empty()) {
        llama_sampler_chain_add(sampler.chain,
                                llama_sampler_init_logit_bias(n_vocab, (int32_t) bias.size(), bias.data()));
    }
    if (args.repeat_penalty != 1.0f || args.frequency_penalty != 0.0f || args.presence_penalty != 0.0f) {
        const int32_t last_n = args.repeat_last_n < 0 ? (int32_t) session.n_ctx : args.repeat_last_n;
        llama_sampler_chain_add(sampler.chain, llama_sampler_init_penalties(n_vocab, last_n, args.repeat_penalty,
                                                                            args.frequency_penalty,
                                                                            args.presence_penalty));
    }
    if (args.temp <= 0.0f) {
        llama_sampler_chain_add(sampler.chain, llama_sampler_init_greedy());
    } else {
        llama_sampler_chain_add(sampler.chain, llama_sampler_init_top_k(args.top_k));
        llama_sampler_chain_add(sampler.chain, llama_sampler_init_top_p(args.top_p, 1));
        llama_sampler_chain_add(sampler.chain, llama_sampler_init_min_p(args.min_p, 1));
        llama_sampler_chain_add(sampler.chain, llama_sampler_init_temp(args.temp));
        llama_sampler_chain_add(sampler.chain, llama_sampler_init_dist(seed));
    }
    if (!grammar.empty()) {
        pinfer_stderr_catch();
        sampler.grammar         = llama_sampler_init_grammar(session.vocab, grammar.c_str(), "root");
        const std::string said  = pinfer_stderr_release();
        const std::string cause = said.substr(0, said.find('\n'));
        if (!sampler.grammar) {
            err = "the grammar cannot be parsed" + (cause.empty() ? "" : " (" + cause + ")") +
                  "; it wants GBNF with a rule named root";
            pinfer_sampler_free(sampler);
            return false;
        }
    }
    return true;
}

void pinfer_sampler_free(pinfer_sampler & sampler) {
    if (sampler.grammar) {
        llama_sampler_free(sampler.grammar);
    }
    if (sampler.chain) {
        llama_sampler_free(sampler.chain);
    }
    sampler.grammar = nullptr;
    sampler.chain   = nullptr;
}

void pinfer_sampler_see(pinfer_sampler & sampler, const std::vector<llama_token> & prompt) {
    for (const llama_token token : prompt) {
        llama_sampler_accept(sampler.chain, token);
    }
}

static llama_token_data_array candidates_fill(pinfer_sampler & sampler, const float * logits, int32_t n_vocab) {
    sampler.candidates.resize((size_t) n_vocab);
    for (llama_token token = 0; token < n_vocab; token++) {
        sampler.candidates[(size_t) token] = { token, logits[token], 0.0f };
    }
    return { sampler.candidates.data(), sampler.candidates.size(), -1, false };
}

bool pinfer_sampler_next(pinfer_sampler & sampler, const pinfer_session & session, llama_token & token,
                         std::string & err) {
    const int32_t n_vocab = llama_vocab_n_tokens(session.vocab);
    const float * logits  = llama_get_logits_ith(session.context, -1);
    if (!logits) {
        err = "libllama gave no logits; -v shows its log";
        return false;
    }
    llama_token_data_array array = candidates_fill(sampler, logits, n_vocab);
    llama_sampler_apply(sampler.chain, &array);
    if (array.selected >= 0 && sampler.grammar) {
        // Most tokens fit the grammar: it is applied to the whole vocabulary only when the chosen one does not.
        llama_token_data       one       = { array.data[array.selected].id, 1.0f, 0.0f };
        llama_token_data_array one_array = { &one, 1, -1, false };
        llama_sampler_apply(sampler.grammar, &one_array);
        if (one.logit == -INFINITY) {
            array = candidates_fill(sampler, logits, n_vocab);
            llama_sampler_apply(sampler.grammar, &array);
            llama_sampler_apply(sampler.chain, &array);
        }
    }
    token = array.selected >= 0 ? array.data[array.selected].id : LLAMA_TOKEN_NULL;
    if (token < 0 || token >= n_vocab || !std::isfinite(logits[token])) {
        err = "the model's output is not a number; the file may be damaged";
        return false;
    }
    llama_sampler_accept(sampler.chain, token);
    if (sampler.grammar) {
        llama_sampler_accept(sampler.grammar, token);
    }
    return true;
}
