// state.h: what the process has configured: the artefacts of one model, the counters, the observer.
#pragma once

#include "activation.h"
#include "cold.h"
#include "device.h"
#include "observer.h"
#include "pinfer.h"
#include "predictor.h"

#include <memory>
#include <mutex>
#include <string>
#include <vector>

struct pinfer_state {
    pinfer_rule                       rule;
    int64_t                           n_batch_dense = 0;
    std::unique_ptr<pinfer_predictor> predictor;
    std::vector<std::unique_ptr<pinfer_hot>> hot; // one a device, in the order in which their sums are added
    std::unique_ptr<pinfer_cold>      cold;
    pinfer_observer                   observer;
    pinfer_stats                      stats = {};
    bool                              announce_fallback = false; // say it once on stderr; nobody asks for the counters
    std::string                       failure; // why the last FFN could not be computed
    std::mutex                        mutex; // several contexts may compute; FFNs run one at a time
};

pinfer_state & pinfer_state_get();

// Keeps the reason for who asks for it, or says it.
void pinfer_state_fail(pinfer_state * s, const std::string & why);

// For programs that only know GGML_BACKEND_PATH: PINFER_ACTIVATION, PINFER_ACTIVATION_THRESHOLD, and PINFER_MODEL with
// PINFER_ARTEFACTS (a folder).
void pinfer_state_configure_from_env();
