// predictor.h: names the neurons of a layer that may fire (docs/formats.md, predictor.gguf).
#pragma once

#include "artefact.h"
#include "cold.h"
#include "kernels.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// Memory of its own, 64-byte aligned, in huge pages where the system gives them.
struct pinfer_buffer {
    uint8_t * data = nullptr;

    pinfer_buffer() = default;
    pinfer_buffer(const pinfer_buffer &) = delete;
    pinfer_buffer & operator=(const pinfer_buffer &) = delete;
    pinfer_buffer(pinfer_buffer && other) noexcept : data(other.data) { other.data = nullptr; }
    ~pinfer_buffer();

    void allocate(size_t n_bytes); // throws std::bad_alloc
};

// A matrix of a predictor, cut into tiles of PINFER_TILE_ROWS rows. Rows of 4 bits come at 9 GB/s one by one, at 35 to 50 in
// tiles. Empty where the type has none: rows of F16 come as fast as memory goes, 33 to 52 GB/s.
struct pinfer_tiles {
    pinfer_buffer      buffer;
    pinfer_multiply_fn multiply = nullptr;
    size_t             size = 0; // bytes of one
};

// One FFN: hidden z = A·x + c (mlp: relu of it), score_i = B_i·z, neuron i is a candidate when score_i > t_i. Where B is of
// a few bits, z is x itself.
struct pinfer_predictor_ffn {
    int64_t               rank = 0; // 0: no predictor, every neuron is a candidate
    int64_t               n = 0; // neurons, of all experts of a stack
    int64_t               n_embd = 0; // columns of A
    int                   bits = 0; // of the numbers of B, 0: b_kernel's type
    bool                  relu = false;
    const pinfer_kernel * a_kernel = nullptr;
    const pinfer_kernel * b_kernel = nullptr;
    const uint8_t *       a = nullptr; // [rank] rows of n_embd
    const float *         c = nullptr; // [rank]; null: 0
    const uint8_t *       b = nullptr; // [n_ff] rows of rank
    const float *         t = nullptr; // [n_ff]
    size_t                a_row = 0;   // bytes
    size_t                b_row = 0;

    // t in the order of the neurons that are scored, infinite up to a multiple of PINFER_TILE_ROWS; B in the same order.
    std::vector<float> thresholds;
    pinfer_tiles       a_tiles, b_tiles;
};

struct pinfer_predictor {
    pinfer_artefact                     file;
    std::vector<pinfer_predictor_ffn> ffns;
};

// Arranges A, and B for the given neurons of each FFN (null, and in stacks: all of them in the model's order), so that scores stream
// from memory.
void pinfer_predictor_arrange(pinfer_predictor * p, const std::vector<pinfer_neurons> * neurons);

// hidden[t*rank + r] of the rows [begin, end) of A, multiples of PINFER_TILE_ROWS, for n_tokens prepared inputs x.
void pinfer_predictor_hidden(const pinfer_predictor_ffn & p, int64_t begin, int64_t end, const uint8_t * x, size_t x_row,
                             int64_t n_tokens, float * hidden);

// score[t*PINFER_TILE_ROWS + r] of the neurons at places j to j + n - 1 (j a multiple of PINFER_TILE_ROWS, n at most that
// many, any finite number beyond them) for the n_tokens prepared hidden vectors z.
void pinfer_predictor_scores(const pinfer_predictor_ffn & p, const int32_t * ids, int64_t j, int64_t n, const uint8_t * z,
                             size_t z_row, int64_t n_tokens, float * score);

bool pinfer_predictor_open(pinfer_predictor * p, const char * path, const pinfer_origin & origin, std::string * err);
