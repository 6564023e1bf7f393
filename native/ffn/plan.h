// plan.h: computes a matched FFN: densely or only what fires, from the model's own matrices or from its shards.
#pragma once

#include "model.h"
#include "nodes.h"
#include "team.h"

// The model's mutex is held.
ggml_status pinfer_ffn_compute(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f);
