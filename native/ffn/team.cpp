// team.cpp: the CPU backend and the scratch memory of a team.
#include "team.h"

#include "ggml-cpu.h"

// A split is one FFN, some 10 nodes; more are sent on in portions.
static const size_t GRAPH_SIZE = 64;

bool pinfer_team_init(pinfer_team * team) {
    team->cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (!team->cpu) {
        return false;
    }
    team->graph_ctx = ggml_init({.mem_size   = ggml_graph_overhead_custom(GRAPH_SIZE, false) + ggml_tensor_overhead(),
                                 .mem_buffer = nullptr,
                                 .no_alloc   = true});
    team->graph     = ggml_new_graph_custom(team->graph_ctx, GRAPH_SIZE, false);
    pinfer_team_set_n_threads(team, team->n_threads);
    return true;
}

void pinfer_team_free(pinfer_team * team) {
    if (team->graph_ctx) {
        ggml_free(team->graph_ctx);
    }
    if (team->cpu) {
        ggml_backend_free(team->cpu);
    }
}

void pinfer_team_set_n_threads(pinfer_team * team, int n_threads) {
    team->n_threads = n_threads;
    auto * set      = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_get_device(team->cpu)), "ggml_backend_set_n_threads");
    if (set) {
        set(team->cpu, n_threads);
    }
}

uint8_t * pinfer_team_arena(pinfer_team * team, size_t size) {
    if (team->arena.size() < size + 64) {
        team->arena.resize(size + 64);
    }
    return (uint8_t *) (((uintptr_t) team->arena.data() + 63) / 64 * 64);
}

ggml_status pinfer_team_nodes(pinfer_team * team, ggml_tensor * const * nodes, int n) {
    ggml_graph_clear(team->graph);
    int queued = 0;
    for (int i = 0; i < n; i++) {
        if (nodes[i]) {
            ggml_graph_add_node(team->graph, nodes[i]);
            queued++;
        }
    }
    return queued ? ggml_backend_graph_compute(team->cpu, team->graph) : GGML_STATUS_SUCCESS;
}
