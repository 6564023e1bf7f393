// run.h: the state of the one run of this process.
#pragma once

#include "options.h"
#include "report.h"

#include <string>

struct pinfer_run {
    pinfer_options options;
    pinfer_answer  answer;      // of a completion
    std::string    error;       // the first one that llama.cpp reported
    bool           generating  = false;
    bool           interactive = false;
    bool           verbose     = false;
};

// Connects the hooks in llama.cpp's programs with the run; from now on the log is silent until a program sets it up.
void pinfer_hooks_start(pinfer_run & run);

// For callers that have to tell flags from their values: "VERB<tab>FLAG<tab>VALUES<tab>VARIABLE" for each flag of each program.
void pinfer_flags_print(void);

// Says the closing line and what else is to be known of the run, once. The context may be NULL.
void pinfer_run_end(pinfer_run & run, const llama_context * ctx);
