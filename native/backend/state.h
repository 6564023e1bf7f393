// state.h: what the process has configured: the artefacts of one model, the counters, the observer.
#pragma once

#include "activation.h"
#include "cold.h"
#include "hot.h"
#include "observer.h"
#include "pinfer.h"
#include "predictor.h"

#include <memory>
#include <mutex>
#include <string>

struct pinfer_state {
    pinfer_rule                       rule;
    int64_t                           n_batch_dense = 0;
    std::unique_ptr<pinfer_predictor> predictor;
    std::unique_ptr<pinfer_hot>       hot;
    std::unique_ptr<pinfer_cold>      cold;
    pinfer_observer                   observer;
    pinfer_stats                      stats = {};
    bool                              announce_fallback = false; // say it once on stderr
    std::mutex                        mutex; // several contexts may compute; FFNs run one at a time
};

pinfer_state & pinfer_state_get();

// For programs that only know GGML_BACKEND_PATH: PINFER_ACTIVATION, PINFER_ACTIVATION_THRESHOLD, and PINFER_MODEL with
// PINFER_ARTEFACTS (a folder).
void pinfer_state_configure_from_env();
