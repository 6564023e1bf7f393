// attention.h: decode attention over long caches, in place of ggml-cpu's.
//
// Claimed is FLASH_ATTN_EXT with few queries a sequence, an F16, Q8_0 or Q4_0 cache, and no ALiBi, logit softcap or sinks, while
// a model of the plugin is in use. Everything else stays ggml's. docs/attention.md explains the method.
#pragma once

#include "ggml.h"

// Hooks into ggml-cpu, once for the process. Does nothing where the plugin has no code for this machine, where ggml-cpu has no
// hook, or with PINFER_ATTENTION=off. Caches of less than 512 positions are left to ggml unless it is "always".
void pinfer_attention_install();

// Whether this operation can be computed here, whatever models are in use.
bool pinfer_attention_knows(const ggml_tensor * op);

// Whether it was, when its graph was planned last.
bool pinfer_attention_took(const ggml_tensor * op);
