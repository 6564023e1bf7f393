// automatic.h: models that configure themselves, in programs that know nothing of pinfer (docs/guest.md).
#pragma once

#include "model.h"

#include <memory>

// Whether this process lets models configure themselves: where the plugin came by LD_PRELOAD or GGML_BACKEND_PATH.
bool pinfer_automatic_on();

// The model of a file that is open and that nobody has configured, by its own header; null where it is not a model's. Says why
// where it is left to llama.cpp.
std::shared_ptr<pinfer_model> pinfer_automatic_recognise(int fd, const pinfer_file_id & id);

// Opens the artefacts of a model that was recognised, when its weights come; says what it takes over. False, with the reason
// said, where the model must not be loaded. Does nothing to a model that is open.
bool pinfer_automatic_open(pinfer_model * m);

// Says of models that were recognised, and whose FFN was never asked for, that llama.cpp computes them.
void pinfer_automatic_say_idle();
