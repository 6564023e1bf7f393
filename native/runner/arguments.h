// arguments.h: the command line of pinfer-runner. Names and defaults are llama.cpp's where llama.cpp has them.
#pragma once

#include <cstdint>
#include <string>

struct pinfer_arguments {
    // model and artefacts
    std::string model;
    std::string artefacts;   // folder; empty: looked for beside the model and under $PINFER_HOME
    std::string activation;  // empty: the model says it
    std::string device;      // ggml device; "none": no device; empty: the first GPU
    std::string rpc;         // RPC servers, host:port[,host:port]; empty: $PINFER_RPC
    bool        dense        = false;  // stock libllama, plugin not registered
    bool        exact        = false;  // the predictor is ignored
    bool        no_artefacts = false;

    // what is asked of it
    std::string prompt;
    std::string prompt_file;
    std::string system_prompt;
    bool        has_prompt            = false;  // -p or -f was given, maybe with an empty text
    bool        conversation          = false;
    bool        no_conversation       = false;
    bool        escape                = true;
    bool        no_display_prompt     = false;
    bool        json                  = false;
    bool        verbose               = false;
    bool        help                  = false;
    int32_t     n_predict             = -1;     // -1: until the model ends or the context is full

    // context
    int32_t     n_ctx           = -1;  // -1: of the placement, else the model's up to 4096; 0: the model's
    int32_t     n_batch         = 2048;
    int32_t     n_ubatch        = 512;
    int32_t     n_batch_dense   = 0;
    int32_t     n_threads       = -1;
    int32_t     n_threads_batch = -1;
    int32_t     n_gpu_layers    = -1;  // -1: of the placement, else none (all of them with --dense)
    std::string flash_attn      = "auto";
    std::string cache_type_k    = "f16";
    std::string cache_type_v    = "f16";
    bool        mlock           = false;
    bool        no_mmap         = false;

    // sampling
    int64_t     seed              = -1;
    float       temp              = 0.8f;
    int32_t     top_k             = 40;
    float       top_p             = 0.95f;
    float       min_p             = 0.05f;
    float       repeat_penalty    = 1.0f;
    int32_t     repeat_last_n     = 64;
    float       presence_penalty  = 0.0f;
    float       frequency_penalty = 0.0f;
    std::string grammar;
    std::string grammar_file;
    bool        ignore_eos        = false;
};

// Fills args from argv. On wrong usage returns false and writes one line into err.
bool pinfer_arguments_parse(int argc, char ** argv, pinfer_arguments & args, std::string & err);

// The text of --help.
std::string pinfer_arguments_help(void);
