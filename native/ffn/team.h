// team.h: the threads that compute an FFN, their scratch memory, and ggml's CPU backend for what is not computed here. One per
// backend instance, so one per llama_context.
#pragma once

#include "ggml-backend.h"
#include "steps.h"

#include <cstdint>
#include <vector>

struct pinfer_team {
    int            n_threads = 4; // libllama's default, until the context sets its own
    ggml_backend_t cpu = nullptr; // takes the same threads
    ggml_context * graph_ctx = nullptr;
    ggml_cgraph *  graph = nullptr; // nodes on their way to `cpu`

    std::vector<uint8_t> arena; // cut up again for every FFN
    std::vector<float>   x_copy;
    long                 blocks_read = 0; // by this process, when it was last asked
    pinfer_stopwatch     watch;           // of the thread that the others work for
};

bool pinfer_team_init(pinfer_team * team);
void pinfer_team_free(pinfer_team * team);
void pinfer_team_set_n_threads(pinfer_team * team, int n_threads);

// At least size bytes, 64-byte aligned, good until the next call. Throws std::bad_alloc, so it is for one thread to call.
uint8_t * pinfer_team_arena(pinfer_team * team, size_t size);

// Nodes as they are, by the CPU backend; null ones are passed over.
ggml_status pinfer_team_nodes(pinfer_team * team, ggml_tensor * const * nodes, int n);
