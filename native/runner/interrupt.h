// interrupt.h: Ctrl-C and the crashes that a damaged file can cause.
#pragma once

#include <string>

enum pinfer_stage {
    PINFER_STAGE_LOADING,     // Ctrl-C leaves at once with 130; a crash is the model file's fault
    PINFER_STAGE_GENERATING,  // the first Ctrl-C asks for a stop, the second leaves at once
    PINFER_STAGE_INPUT,       // Ctrl-C wakes whoever waits on pinfer_interrupt_fd()
};

// Installs the handlers; model_path is named when loading it brings libllama down.
void pinfer_interrupt_install(const std::string & model_path);
void pinfer_interrupt_stage(enum pinfer_stage stage);

bool pinfer_interrupted(void);       // a Ctrl-C is waiting
void pinfer_interrupt_reset(void);   // it has been dealt with
int  pinfer_interrupt_fd(void);      // readable while a Ctrl-C is waiting

// For llama_set_abort_callback(): stops a decode within the current graph.
bool pinfer_interrupt_abort_callback(void * unused);
