// plugin_setup.h: the plugin, loaded and configured for the models of a run.
#pragma once

#include "options.h"

#include "ggml-backend.h"

// Connects the RPC servers, registers the plugin and tells it about every model of the options. Without models nothing is loaded and libllama is as it
// was. Returns false and writes one line into err.
bool pinfer_plugin_setup(const pinfer_options & options, std::string & err);

// Where libllama has to put the FFN; NULL where there is no plugin.
ggml_backend_buffer_type_t pinfer_plugin_buffer_type(void);
extern const char * const  pinfer_plugin_tensors;  // regular expression of their names
