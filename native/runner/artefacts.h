// artefacts.h: which of a model's artefacts exist, and what its placement was solved for.
#pragma once

#include <cstdint>
#include <string>

struct pinfer_artefacts {
    std::string folder;     // empty: there is none
    std::string predictor;  // paths; empty: absent
    std::string hot;        // only when at least one neuron is hot
    std::string cold;
    std::string placement;

    // of placement.gguf
    uint64_t    vram         = 0;  // budget in bytes, 0 without a placement
    uint32_t    n_gpu_layers = 0;
    uint32_t    n_ctx        = 0;
    uint64_t    n_hot        = 0;  // over all layers
    std::string device;            // ggml device it was solved for
};

// Looks in `folder` if it is given, else where the other commands write: MODEL.pinfer/ beside the model, or
// <file name>-<12 digits of fingerprint>/ in $PINFER_HOME (else $XDG_DATA_HOME/pinfer, ~/.local/share/pinfer).
// No folder at all is no error unless it was named. On failure returns false and writes one line into err.
bool pinfer_artefacts_find(const std::string & model_path, const std::string & folder, pinfer_artefacts & artefacts,
                           std::string & err);
