// plugin_setup.h: the plugin, loaded and configured for the models of a run.
#pragma once

#include "options.h"

#include "llama.h"

// Connects the RPC servers, registers the plugin and tells it about every model of the options. Without models nothing is loaded and libllama is as it
// was. Returns false and writes one line into err.
bool pinfer_plugin_setup(const pinfer_options & options, std::string & err);

// Where libllama has to put which tensors of a model: its FFNs into the plugin's buffers, experts without exact zeros where it puts
// those of the CPU.
llama_model_tensor_buft_override pinfer_plugin_override(const pinfer_model_options & model);
