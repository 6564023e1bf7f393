// predictor.h: names the neurons of a layer that may fire (docs/formats.md, predictor.gguf).
#pragma once

#include "artefact.h"
#include "kernels.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// Factors of one layer: hidden z = A·x (mlp: relu of it), score_i = B_i·z, neuron i is a candidate when score_i > t_i.
struct pinfer_predictor_layer {
    int64_t               rank = 0; // 0: no predictor, every neuron is a candidate
    bool                  relu = false;
    const pinfer_kernel * a_kernel = nullptr;
    const pinfer_kernel * b_kernel = nullptr;
    const uint8_t *       a = nullptr; // [rank] rows of n_embd
    const uint8_t *       b = nullptr; // [n_ff] rows of rank
    const float *         t = nullptr; // [n_ff]
    size_t                a_row = 0;   // bytes
    size_t                b_row = 0;
};

struct pinfer_predictor {
    pinfer_artefact                     file;
    std::vector<pinfer_predictor_layer> layers;
};

bool pinfer_predictor_open(pinfer_predictor * p, const char * path, const char * model_path, const char * fingerprint,
                           std::string * err);
