// steps.cpp: the laps of all stopwatches, and the nodes that ggml computes.
#include "steps.h"

#include "ggml.h"
#include "match.h"
#include "pinfer_steps.h"

#include <atomic>
#include <mutex>

namespace {

std::atomic<bool> is_on{false};
std::mutex        mutex;
double            total[PINFER_STEPS];

const char * const NAMES[PINFER_STEPS] = {
    "FFN: input quantised", "FFN: predictor", "FFN: first products", "FFN: second products", "FFN: down rows",
    "FFN: waiting for threads", "FFN: sums of threads", "FFN: other", "ggml: products", "ggml: attention",
    "ggml: small nodes",
};

pinfer_step step_of(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return ggml_is_quantized(node->src[0]->type) || node->src[0]->op == GGML_OP_NONE ? PINFER_STEP_PRODUCTS
                                                                                             : PINFER_STEP_ATTENTION;
        case GGML_OP_FLASH_ATTN_EXT:
        case GGML_OP_SOFT_MAX:
            return PINFER_STEP_ATTENTION;
        default:
            return PINFER_STEP_SMALL;
    }
}

} // namespace

bool pinfer_steps_on() {
    return is_on;
}

void pinfer_stopwatch::stop() {
    if (on) {
        std::lock_guard<std::mutex> lock(mutex);
        for (int i = 0; i < PINFER_STEPS; i++) {
            total[i] += seconds[i];
            seconds[i] = 0.0;
        }
    }
}

void pinfer_steps_start(void) {
    std::lock_guard<std::mutex> lock(mutex);
    for (double & seconds : total) {
        seconds = 0.0;
    }
    is_on = true;
}

const char * pinfer_steps_get(int32_t step, double * seconds) {
    if (step < 0 || step >= PINFER_STEPS) {
        return nullptr;
    }
    std::lock_guard<std::mutex> lock(mutex);
    *seconds = total[step];
    return NAMES[step];
}

bool pinfer_steps_eval(ggml_tensor * node, bool ask, void *) {
    static thread_local pinfer_stopwatch watch; // libllama calls from the thread that decodes
    if (pinfer_match_claim(node).weight) {
        return !ask; // stays in its FFN
    }
    if (ask) {
        watch.start();
    } else {
        watch.lap(step_of(node));
        watch.stop();
    }
    return true;
}
