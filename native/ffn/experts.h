// experts.h: experts without exact zeros that are on no device, by ggml's own products where llama.cpp has put their weights.
#pragma once

#include "model.h"
#include "nodes.h"
#include "team.h"

// Whether the stack in memory is that of the hot shards: experts of each give the same products from both. The stack may have any
// layout, and a model of the same shape may be loaded beside this one.
bool pinfer_experts_are_of(pinfer_team * team, const pinfer_model & m, const pinfer_ffn & f);

// out [n_tokens, n_embd] = the sum over the experts of each token that are on no device, times their weights. *n: how many.
ggml_status pinfer_experts_compute(pinfer_team * team, const pinfer_model & m, const pinfer_ffn & f, const pinfer_routes & routes,
                                   const float * x, uint64_t * n);
