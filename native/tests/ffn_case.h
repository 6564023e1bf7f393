// ffn_case.h: a small FFN for tests: a random model of a kind, its shards on disk, libllama's graph of it, and a reference in
// double precision.
#pragma once

#include "artefact.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"
#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <mutex>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

static const int64_t N_EMBD = 256;
static const int64_t N_FF   = 512;

extern "C" ggml_backend_reg_t ggml_backend_init(void);

inline std::mt19937 rng(7);
inline int          failures = 0;

inline void check(bool ok, const std::string & what) {
    if (!ok) {
        printf("FAIL %s\n", what.c_str());
        failures++;
    }
}

// One matrix: quantised bytes and the values they stand for.
struct matrix {
    ggml_type            type;
    int64_t              n, rows;
    std::vector<uint8_t> data;
    std::vector<float>   value;

    const float * row(int64_t i) const { return value.data() + i * n; }
};

inline matrix quantised(ggml_type type, int64_t n, int64_t rows, const std::vector<float> & v) {
    matrix m = {.type = type, .n = n, .rows = rows, .data = {}, .value = {}};
    m.data.resize(ggml_row_size(type, n) * (size_t) rows);
    m.value.resize(v.size());
    ggml_quantize_chunk(type, v.data(), m.data.data(), 0, rows, n, nullptr);
    if (type == GGML_TYPE_F32) {
        m.value = v;
    } else {
        ggml_get_type_traits(type)->to_float(m.data.data(), m.value.data(), rows * n);
    }
    return m;
}

inline std::vector<float> noise(int64_t n, float scale, float mean = 0.0f) {
    std::normal_distribution<float> d(mean, scale);
    std::vector<float>              v((size_t) n);
    for (float & x : v) {
        x = d(rng);
    }
    return v;
}

struct ffn_case {
    pinfer_activation act;
    bool              biases;
    ggml_type         type;
    float             threshold = 0.0f;

    bool gated() const { return pinfer_is_gated(act); }
};

struct model {
    ffn_case           c;
    matrix             gate, up, down;
    std::vector<float> gate_bias, up_bias, down_bias;
};

inline model make_model(const ffn_case & c) {
    const float scale = 1.0f / std::sqrt((float) N_EMBD);
    model       m     = {.c         = c,
                         .gate      = quantised(c.type, N_EMBD, N_FF, noise(N_EMBD * N_FF, scale)),
                         .up        = quantised(c.type, N_EMBD, N_FF, noise(N_EMBD * N_FF, scale)),
                         .down      = quantised(c.type, N_FF, N_EMBD, noise(N_EMBD * N_FF, scale)),
                         .gate_bias = noise(c.biases ? N_FF : 0, 0.5f, -1.0f),
                         .up_bias   = noise(c.biases ? N_FF : 0, 0.5f, -0.5f),
                         .down_bias = noise(c.biases ? N_EMBD : 0, 0.5f)};
    return m;
}

inline double reference_h(const model & m, int64_t i, const float * x) {
    double u = m.up_bias.empty() ? 0 : m.up_bias[(size_t) i];
    double g = m.gate_bias.empty() ? 0 : m.gate_bias[(size_t) i];
    for (int64_t k = 0; k < N_EMBD; k++) {
        u += (double) m.up.row(i)[k] * x[k];
        g += (double) m.gate.row(i)[k] * x[k];
    }
    const double relu_u = u > m.c.threshold ? u : 0.0, relu_g = g > m.c.threshold ? g : 0.0;
    switch (m.c.act) {
        case PINFER_ACT_RELU:
            return relu_u;
        case PINFER_ACT_RELU2:
            return relu_u * relu_u;
        case PINFER_ACT_REGLU:
            return relu_g * u;
        default:
            return relu_g * relu_u;
    }
}

// y and the number of active neurons
inline std::vector<double> reference(const model & m, const std::vector<float> & x, int64_t n_tokens, uint64_t * active) {
    std::vector<double> y((size_t) (N_EMBD * n_tokens));
    *active = 0;
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t e = 0; e < N_EMBD && !m.down_bias.empty(); e++) {
            y[(size_t) (t * N_EMBD + e)] = m.down_bias[(size_t) e];
        }
        for (int64_t i = 0; i < N_FF; i++) {
            const double h = reference_h(m, i, x.data() + t * N_EMBD);
            *active += h != 0;
            for (int64_t e = 0; e < N_EMBD && h != 0; e++) {
                y[(size_t) (t * N_EMBD + e)] += h * m.down.row(e)[i];
            }
        }
    }
    return y;
}

struct shard_paths {
    std::string model, hot, cold, predictor;
};

inline void add_common(gguf_context * g, const char * kind, const ffn_case & c, const std::string & fingerprint) {
    gguf_set_val_u32(g, "pinfer.format_version", PINFER_FORMAT_VERSION);
    gguf_set_val_str(g, "pinfer.kind", kind);
    gguf_set_val_str(g, "pinfer.model.fingerprint", fingerprint.c_str());
    const char * ffn = "blk.0";
    gguf_set_arr_str(g, "pinfer.ffns", &ffn, 1);
    gguf_set_val_str(g, "pinfer.activation", pinfer_activation_name(c.act));
    gguf_set_val_f32(g, "pinfer.activation_threshold", c.threshold);
    gguf_set_val_str(g, "pinfer.placement.id", "0123456789abcdef");
}

struct writer {
    gguf_context * gguf = gguf_init_empty();
    ggml_context * ctx  = ggml_init({.mem_size = 16u << 20, .mem_buffer = nullptr, .no_alloc = false});

    void add(const char * name, ggml_type type, int64_t ne0, int64_t ne1, const void * data) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_name(t, name);
        memcpy(t->data, data, ggml_nbytes(t));
        gguf_add_tensor(gguf, t);
    }

    void write(const std::string & path) {
        std::vector<uint64_t> checksums;
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            checksums.push_back(pinfer_checksum(t->data, ggml_nbytes(t)));
        }
        gguf_set_arr_data(gguf, "pinfer.checksums", GGUF_TYPE_UINT64, checksums.data(), checksums.size());
        check(gguf_write_to_file(gguf, path.c_str(), false), "write " + path);
        gguf_free(gguf);
        ggml_free(ctx);
    }
};

inline std::vector<uint8_t> rows_of(const matrix & m, const std::vector<int32_t> & ids) {
    const size_t         row = ggml_row_size(m.type, m.n);
    std::vector<uint8_t> out;
    for (int32_t i : ids) {
        out.insert(out.end(), m.data.begin() + (ptrdiff_t) (row * (size_t) i), m.data.begin() + (ptrdiff_t) (row * (size_t) (i + 1)));
    }
    return out;
}

inline std::vector<float> pick(const std::vector<float> & v, const std::vector<int32_t> & ids) {
    std::vector<float> out;
    for (int32_t i : ids) {
        out.push_back(v[(size_t) i]);
    }
    return out;
}

// The down columns of ids, [n_embd, ids] (rows of a neuron) or [ids, n_embd].
inline std::vector<float> down_columns(const matrix & down, const std::vector<int32_t> & ids, bool neuron_major) {
    std::vector<float> out(ids.size() * (size_t) N_EMBD);
    for (size_t j = 0; j < ids.size(); j++) {
        for (int64_t e = 0; e < N_EMBD; e++) {
            out[neuron_major ? j * N_EMBD + (size_t) e : (size_t) e * ids.size() + j] = down.row(e)[ids[j]];
        }
    }
    return out;
}

inline void write_hot(const model & m, const std::vector<int32_t> & ids, const std::string & fp, const std::string & path) {
    writer w;
    add_common(w.gguf, "hot", m.c, fp);
    const auto n = (int64_t) ids.size();
    if (n) {
        w.add("blk.0.neurons", GGML_TYPE_I32, n, 1, ids.data());
        if (m.c.gated()) {
            w.add("blk.0.ffn_gate.weight", m.c.type, N_EMBD, n, rows_of(m.gate, ids).data());
        }
        w.add("blk.0.ffn_up.weight", m.c.type, N_EMBD, n, rows_of(m.up, ids).data());
        w.add("blk.0.ffn_down.weight", GGML_TYPE_F32, n, N_EMBD, down_columns(m.down, ids, false).data());
        if (m.c.biases) {
            w.add("blk.0.ffn_up.bias", GGML_TYPE_F32, n, 1, pick(m.up_bias, ids).data());
            if (m.c.gated()) {
                w.add("blk.0.ffn_gate.bias", GGML_TYPE_F32, n, 1, pick(m.gate_bias, ids).data());
            }
        }
    }
    w.write(path);
}

inline void write_cold(const model & m, const std::vector<int32_t> & ids, const std::string & fp, const std::string & path) {
    writer w;
    add_common(w.gguf, "cold", m.c, fp);
    const auto n = (int64_t) ids.size();
    if (n) {
        w.add("blk.0.neurons", GGML_TYPE_I32, n, 1, ids.data());
        if (m.c.gated()) {
            w.add("blk.0.ffn_gate.weight", m.c.type, N_EMBD, n, rows_of(m.gate, ids).data());
        }
        w.add("blk.0.ffn_up.weight", m.c.type, N_EMBD, n, rows_of(m.up, ids).data());
        w.add("blk.0.ffn_down_t.weight", GGML_TYPE_F32, N_EMBD, n, down_columns(m.down, ids, true).data());
        if (m.c.biases) {
            w.add("blk.0.ffn_up.bias", GGML_TYPE_F32, n, 1, pick(m.up_bias, ids).data());
            if (m.c.gated()) {
                w.add("blk.0.ffn_gate.bias", GGML_TYPE_F32, n, 1, pick(m.gate_bias, ids).data());
            }
        }
    }
    w.write(path);
}

// A predictor that is the first matrix itself (A = identity, B = W) names exactly the neurons that fire (plus rounding).
inline void write_predictor(const model & m, const std::string & fp, const std::string & path) {
    writer w;
    add_common(w.gguf, "predictor", m.c, fp);
    const char *   kind = "low_rank";
    const uint32_t rank = N_EMBD;
    gguf_set_arr_str(w.gguf, "pinfer.predictor.kind", &kind, 1);
    gguf_set_arr_data(w.gguf, "pinfer.predictor.rank", GGUF_TYPE_UINT32, &rank, 1);
    std::vector<float> eye((size_t) (N_EMBD * N_EMBD));
    for (int64_t i = 0; i < N_EMBD; i++) {
        eye[(size_t) (i * N_EMBD + i)] = 1.0f;
    }
    const matrix &             first = m.c.gated() ? m.gate : m.up;
    const std::vector<float> & bias  = m.c.gated() ? m.gate_bias : m.up_bias;
    std::vector<float>         t((size_t) N_FF, m.c.threshold - 0.02f); // quantised x may tip a sum near it
    for (int64_t i = 0; i < N_FF && !bias.empty(); i++) {
        t[(size_t) i] -= bias[(size_t) i];
    }
    w.add("blk.0.pred_a", GGML_TYPE_F32, N_EMBD, N_EMBD, eye.data());
    w.add("blk.0.pred_b", GGML_TYPE_F32, N_EMBD, N_FF, first.value.data());
    w.add("blk.0.pred_t", GGML_TYPE_F32, N_FF, 1, t.data());
    w.write(path);
}

inline ggml_tensor * named(ggml_tensor * t, const char * name) {
    ggml_set_name(t, name);
    return t;
}

// What libllama builds: for architectures with another activation (SwiGLU, GELU), or with that of the case, there spelled
// in two nodes where it is gated.
enum graph_kind { GRAPH_STOCK, GRAPH_NATIVE, GRAPH_SPELLED };

inline ggml_tensor * activation_nodes(ggml_context * ctx, const ffn_case & c, graph_kind kind, ggml_tensor * gate, ggml_tensor * up) {
    if (gate && kind == GRAPH_SPELLED && c.act == PINFER_ACT_REGLU) {
        return named(ggml_mul(ctx, named(ggml_relu(ctx, gate), "ffn_relu-0"), up), "ffn_gate_par-0");
    }
    if (gate) {
        const bool native = kind == GRAPH_NATIVE && c.act == PINFER_ACT_REGLU;
        return native ? named(ggml_reglu_split(ctx, gate, up), "ffn_reglu-0") : named(ggml_swiglu_split(ctx, gate, up), "ffn_swiglu-0");
    }
    if (c.act == PINFER_ACT_RELU2) {
        return named(ggml_sqr(ctx, named(ggml_relu(ctx, up), "ffn_relu-0")), "ffn_sqr(relu)-0");
    }
    return kind != GRAPH_STOCK ? named(ggml_relu(ctx, up), "ffn_relu-0") : named(ggml_gelu(ctx, up), "ffn_gelu-0");
}

// libllama's FFN graph for the case, run by the scheduler on PINFER and CPU as libllama does.
inline std::vector<float> run_graph(const model & m, const std::vector<float> & x, int64_t n_tokens, int n_threads,
                             graph_kind kind = GRAPH_STOCK, bool node_by_node = false,
                                    ggml_status expected = GGML_STATUS_SUCCESS, const char * path = "model.gguf") {
    ggml_backend_t pinfer = ggml_backend_dev_init(ggml_backend_reg_dev_get(ggml_backend_init(), 0), nullptr);
    ggml_backend_t cpu    = ggml_backend_cpu_init();
    auto *         set    = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_get_device(pinfer)), "ggml_backend_set_n_threads");
    set(pinfer, n_threads);
    ggml_backend_cpu_set_n_threads(cpu, n_threads);

    ggml_context * wctx = ggml_init({.mem_size = ggml_tensor_overhead() * 8, .mem_buffer = nullptr, .no_alloc = true});
    ggml_tensor *  gate = m.c.gated() ? named(ggml_new_tensor_2d(wctx, m.c.type, N_EMBD, N_FF), "blk.0.ffn_gate.weight") : nullptr;
    ggml_tensor *  up   = named(ggml_new_tensor_2d(wctx, m.c.type, N_EMBD, N_FF), "blk.0.ffn_up.weight");
    ggml_tensor *  down = named(ggml_new_tensor_2d(wctx, m.c.type, N_FF, N_EMBD), "blk.0.ffn_down.weight");
    ggml_tensor *  gb   = nullptr, *ub = nullptr, *db = nullptr;
    if (m.c.biases) {
        gb = m.c.gated() ? named(ggml_new_tensor_1d(wctx, GGML_TYPE_F32, N_FF), "blk.0.ffn_gate.bias") : nullptr;
        ub = named(ggml_new_tensor_1d(wctx, GGML_TYPE_F32, N_FF), "blk.0.ffn_up.bias");
        db = named(ggml_new_tensor_1d(wctx, GGML_TYPE_F32, N_EMBD), "blk.0.ffn_down.bias");
    }
    // as libllama does: with the file open it asks where a weight may go, then gets memory for it; one model after the other
    static std::mutex            loading;
    std::unique_lock<std::mutex> lock(loading);
    const int  file    = open(path, O_RDONLY);
    const bool claimed = ggml_backend_dev_supports_op(ggml_backend_get_device(pinfer), up);
    ggml_backend_buffer_t weights = ggml_backend_alloc_ctx_tensors(wctx, pinfer);
    check(claimed || expected != GGML_STATUS_SUCCESS, std::string("the FFN of ") + path + " is not claimed");
    close(file);
    lock.unlock();
    ggml_backend_buffer_set_usage(weights, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    auto fill = [](ggml_tensor * t, const void * data) {
        if (t) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
    };
    fill(gate, m.gate.data.data());
    fill(up, m.up.data.data());
    fill(down, m.down.data.data());
    fill(gb, m.gate_bias.data());
    fill(ub, m.up_bias.data());
    fill(db, m.down_bias.data());

    ggml_context * ctx = ggml_init({.mem_size = ggml_tensor_overhead() * 64 + ggml_graph_overhead(), .mem_buffer = nullptr, .no_alloc = true});
    ggml_tensor *  in  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_EMBD, n_tokens);
    ggml_set_input(in);
    ggml_tensor * cur = ggml_scale(ctx, in, 1.0f); // a node of the CPU backend before the FFN
    auto product = [&](ggml_tensor * w, ggml_tensor * b, ggml_tensor * v) {
        ggml_tensor * y = ggml_mul_mat(ctx, w, v);
        return b ? ggml_add(ctx, y, b) : y;
    };
    ggml_tensor * u = product(up, ub, cur);
    ggml_tensor * h = activation_nodes(ctx, m.c, kind, gate ? product(gate, gb, cur) : nullptr, u);
    ggml_tensor * y = ggml_scale(ctx, product(down, db, h), 1.0f);
    ggml_set_output(y);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);

    ggml_backend_t       backends[] = {pinfer, cpu};
    ggml_backend_sched_t sched      = ggml_backend_sched_new(backends, nullptr, 2, GGML_DEFAULT_GRAPH_SIZE, false, false);
    if (node_by_node) { // as with a program's eval callback
        ggml_backend_sched_set_eval_callback(sched, [](ggml_tensor *, bool, void *) { return true; }, nullptr);
    }
    ggml_backend_sched_alloc_graph(sched, graph);
    ggml_backend_tensor_set(in, x.data(), 0, ggml_nbytes(in));
    const ggml_status status = ggml_backend_sched_graph_compute(sched, graph);
    char cause[512] = "";
    pinfer_last_failure(path, cause, sizeof(cause));
    check(status == expected, std::string("graph compute: ") + ggml_status_to_string(status) + " " + cause);
    std::vector<float> out((size_t) ggml_nelements(y));
    ggml_backend_tensor_get(y, out.data(), 0, ggml_nbytes(y));

    ggml_backend_sched_free(sched);
    ggml_free(ctx);
    ggml_backend_buffer_free(weights);
    ggml_free(wctx);
    ggml_backend_free(pinfer);
    ggml_backend_free(cpu);
    return out;
}

inline double nmse(const std::vector<float> & a, const std::vector<double> & b) {
    double err = 0, norm = 0;
    for (size_t i = 0; i < b.size(); i++) {
        err += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return err / norm;
}

// Rounding x (and, in dense products, h) to the type's partner: F16 keeps 11 bits; a Q8 block of normal values has an error
// of about 3.2/127/sqrt(12) = 0.7 % a value, so 5e-5 a product, and three products are chained at most; doubled for luck of x.
inline double tolerance(ggml_type type) {
    return type == GGML_TYPE_F32 ? 1e-11 : type == GGML_TYPE_F16 ? 1e-6 : 3e-4;
}

inline bool configure(const shard_paths & p, const ffn_case & c, bool shards, bool predicted, std::string * err) {
    const char * const hot[]    = {p.hot.c_str(), nullptr};
    const char * const device[] = {"CPU", nullptr};
    const pinfer_params params = {
        .model_path           = p.model.c_str(),
        .predictor_path       = predicted ? p.predictor.c_str() : nullptr,
        .hot_paths            = shards ? hot : nullptr,
        .cold_path            = shards ? p.cold.c_str() : nullptr,
        .devices              = shards ? device : nullptr,
        .activation           = c.act,
        .n_batch_dense        = 0,
        .activation_threshold = c.threshold,
    };
    char text[512] = "";
    const bool ok = pinfer_configure(&params, text, sizeof(text));
    *err          = text;
    return ok;
}

inline std::string describe(const ffn_case & c, int64_t n_tokens, int n_threads, int hot, bool predicted) {
    char text[160];
    snprintf(text, sizeof(text), "%s above %g %s%s tokens %d threads %d %s%s", pinfer_activation_name(c.act),
             (double) c.threshold, ggml_type_name(c.type), c.biases ? " biases" : "", (int) n_tokens, n_threads,
             hot < 0 ? "model" : ("hot " + std::to_string(hot) + "%").c_str(), predicted ? " predicted" : "");
    return text;
}

// What the plugin reads of a model's file: the shape in the header, and the matrices; returns its fingerprint.
inline std::string write_model(const model & m, const std::string & path) {
    std::string fp, err;
    writer      w;
    gguf_set_val_str(w.gguf, "general.architecture", "test");
    gguf_set_val_u32(w.gguf, "test.block_count", 1);
    gguf_set_val_u32(w.gguf, "test.embedding_length", N_EMBD);
    if (m.c.gated()) {
        w.add("blk.0.ffn_gate.weight", m.c.type, N_EMBD, N_FF, m.gate.data.data());
    }
    w.add("blk.0.ffn_up.weight", m.c.type, N_EMBD, N_FF, m.up.data.data());
    w.add("blk.0.ffn_down.weight", m.c.type, N_FF, N_EMBD, m.down.data.data());
    w.write(path);
    check(pinfer_fingerprint_file(path.c_str(), &fp, &err), "fingerprint " + err);
    return fp;
}

inline std::string write_model(const model & m, const shard_paths & p) {
    return write_model(m, p.model);
}

// So many percent of the neurons are hot, the first ones of the order.
inline void write_shards(const model & m, const std::vector<int32_t> & order, int hot, const std::string & fp, const shard_paths & p) {
    const auto cut = order.begin() + (ptrdiff_t) (N_FF * hot / 100);
    write_hot(m, {order.begin(), cut}, fp, p.hot);
    write_cold(m, {cut, order.end()}, fp, p.cold);
}
