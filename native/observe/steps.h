// steps.h: where the time of a token goes, step by step, as the first thread of the team sees it.
#pragma once

#include "trace.h"

enum pinfer_step {
    PINFER_STEP_PREPARE, // x and z into the types of the rows
    PINFER_STEP_SCORE,   // the predictor
    PINFER_STEP_FIRST,   // first products
    PINFER_STEP_SECOND,  // second products, where there are any
    PINFER_STEP_DOWN,    // down rows
    PINFER_STEP_WAIT,    // for other threads
    PINFER_STEP_SUM,     // sums of all threads
    PINFER_STEP_OTHER,   // the rest of a split: matching, waking the threads, what is not computed by neurons
    PINFER_STEPS_FFN,
    // by pinfer_steps_eval
    PINFER_STEP_PRODUCTS = PINFER_STEPS_FFN,
    PINFER_STEP_ATTENTION,
    PINFER_STEP_SMALL, // norms, RoPE, additions, copies
    PINFER_STEPS
};

bool pinfer_steps_on();

// A stopwatch; does nothing where it was not started.
class pinfer_stopwatch {
public:
    void start() {
        on = pinfer_steps_on();
        at = on ? pinfer_clock() : 0.0;
    }

    // What has passed since the last lap was this step.
    void lap(pinfer_step step) {
        if (on) {
            const double now = pinfer_clock();
            seconds[step] += now - at;
            at = now;
        }
    }

    // Adds the laps to those of the process.
    void stop();

private:
    bool   on = false;
    double at = 0.0, seconds[PINFER_STEPS] = {};
};
