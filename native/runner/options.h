// options.h: what the caller decided about a run. Flags that begin with --pinfer- are the runner's; all others go to
// llama.cpp. Nothing is looked for here: `pinfer` names every file.
#pragma once

#include "pinfer.h"

#include <cstdint>
#include <string>
#include <vector>

// A model that the plugin computes.
struct pinfer_model_options {
    std::string              path;
    enum pinfer_activation   activation = PINFER_ACT_GRAPH;
    float                    threshold  = 0.0f;
    std::string              predictor;      // empty: exact mode
    std::string              cold;           // empty: neurons are read from the model
    std::vector<std::string> hot;            // a shard a device
    std::vector<std::string> devices;        // ggml devices: one for each hot shard, or for dense layers alone; empty: the GPUs
    std::vector<uint64_t>    needed;         // bytes that must be free on each of them; 0: not known
};

struct pinfer_options {
    std::string                       verb;       // completion, cli or server; flags: list the flags of all three
    std::vector<pinfer_model_options> models;     // none: stock llama.cpp
    std::string                       rpc;        // RPC servers, host:port[,host:port]
    uint64_t                          vram = 0;   // budget to report beside the device memory in use; 0: all of it
    bool                              json = false;
    std::vector<char *>               rest;       // llama.cpp's command line, program name included, NULL at the end
};

// Fills options from argv. On wrong usage returns false and writes one line into err.
bool pinfer_options_parse(int argc, char ** argv, pinfer_options & options, std::string & err);
