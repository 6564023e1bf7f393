// artefacts.h: which of a model's artefacts exist, and what its placement was solved for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct pinfer_artefacts {
    std::string folder;     // empty: there is none
    std::string predictor;  // paths; empty: absent
    std::string cold;
    std::string placement;
    std::vector<std::string> hot;  // a shard a device, in their order; none where no neuron is hot

    // of placement.gguf
    uint64_t vram         = 0;  // budget of all devices in bytes, 0 without a placement
    uint32_t n_gpu_layers = 0;
    uint32_t n_ctx        = 0;
    uint64_t n_hot        = 0;  // over all layers and devices
    std::vector<std::string> devices;  // ggml devices it was solved for
    std::vector<uint64_t>    needed;   // bytes it takes of each device
};

// The parts of a list "a,b"; empty parts are left out.
std::vector<std::string> pinfer_list_split(const std::string & list);

// Looks in `folder` if it is given, else where the other commands write: MODEL.pinfer/ beside the model, or
// <file name>-<12 digits of fingerprint>/ in $PINFER_HOME (else $XDG_DATA_HOME/pinfer, ~/.local/share/pinfer).
// No folder at all is no error unless it was named. On failure returns false and writes one line into err.
bool pinfer_artefacts_find(const std::string & model_path, const std::string & folder, pinfer_artefacts & artefacts,
                           std::string & err);
