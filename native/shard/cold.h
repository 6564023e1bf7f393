// cold.h: the cold shard: the neurons the CPU computes, a row of each matrix for every neuron (docs/formats.md).
#pragma once

#include "artefact.h"
#include "kernels.h"

#include <cstdint>
#include <string>
#include <vector>

// Row j of one FFN matrix lies at data + j*stride; data is null where the matrix is absent.
struct pinfer_rows {
    const uint8_t *       data = nullptr;
    size_t                stride = 0;
    const pinfer_kernel * kernel = nullptr;
    const float *         bias = nullptr; // [n], null: none
};

// n neurons a processor can compute; ids[j] is the neuron's number in the model, null: j itself. Of a stack n experts, whose
// gate and up rows are the model's own, and whose down rows begin at row place[e] for expert e; -1: it is elsewhere.
struct pinfer_neurons {
    int64_t              n = 0;
    const int32_t *      ids = nullptr;
    pinfer_rows          gate, up, down; // down: one row of n_embd a neuron; absent: the model's own matrix is used
    std::vector<int64_t> place;
};

struct pinfer_cold {
    pinfer_artefact             file;
    std::string                 placement_id;
    std::vector<pinfer_neurons> ffns;
};

bool pinfer_cold_open(pinfer_cold * c, const char * path, const pinfer_origin & origin, std::string * err);
