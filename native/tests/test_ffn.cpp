// test_ffn.cpp: the plugin's FFN against a double-precision reference: every activation, with and without biases, gates and
// shards, on batches and thread counts, from the model's own matrices and from hot and cold shards on a second CPU device.
#include "ffn.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"
#include "state.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

static const int64_t N_EMBD = 256;
static const int64_t N_FF   = 512;

extern "C" ggml_backend_reg_t ggml_backend_init(void);

namespace {

std::mt19937 rng(7);
int          failures = 0;

void check(bool ok, const std::string & what) {
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

matrix quantised(ggml_type type, int64_t n, int64_t rows, const std::vector<float> & v) {
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

std::vector<float> noise(int64_t n, float scale, float mean = 0.0f) {
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

model make_model(const ffn_case & c) {
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

double reference_h(const model & m, int64_t i, const float * x) {
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
std::vector<double> reference(const model & m, const std::vector<float> & x, int64_t n_tokens, uint64_t * active) {
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

void add_common(gguf_context * g, const char * kind, const ffn_case & c, const std::string & fingerprint) {
    gguf_set_val_u32(g, "pinfer.format_version", PINFER_FORMAT_VERSION);
    gguf_set_val_str(g, "pinfer.kind", kind);
    gguf_set_val_str(g, "pinfer.model.fingerprint", fingerprint.c_str());
    gguf_set_val_u32(g, "pinfer.n_layer", 1);
    gguf_set_val_u32(g, "pinfer.n_embd", N_EMBD);
    gguf_set_val_u32(g, "pinfer.n_ff", N_FF);
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
        check(gguf_write_to_file(gguf, path.c_str(), false), "write " + path);
        gguf_free(gguf);
        ggml_free(ctx);
    }
};

std::vector<uint8_t> rows_of(const matrix & m, const std::vector<int32_t> & ids) {
    const size_t         row = ggml_row_size(m.type, m.n);
    std::vector<uint8_t> out;
    for (int32_t i : ids) {
        out.insert(out.end(), m.data.begin() + (ptrdiff_t) (row * (size_t) i), m.data.begin() + (ptrdiff_t) (row * (size_t) (i + 1)));
    }
    return out;
}

std::vector<float> pick(const std::vector<float> & v, const std::vector<int32_t> & ids) {
    std::vector<float> out;
    for (int32_t i : ids) {
        out.push_back(v[(size_t) i]);
    }
    return out;
}

// The down columns of ids, [n_embd, ids] (rows of a neuron) or [ids, n_embd].
std::vector<float> down_columns(const matrix & down, const std::vector<int32_t> & ids, bool neuron_major) {
    std::vector<float> out(ids.size() * (size_t) N_EMBD);
    for (size_t j = 0; j < ids.size(); j++) {
        for (int64_t e = 0; e < N_EMBD; e++) {
            out[neuron_major ? j * N_EMBD + (size_t) e : (size_t) e * ids.size() + j] = down.row(e)[ids[j]];
        }
    }
    return out;
}

void write_hot(const model & m, const std::vector<int32_t> & ids, const std::string & fp, const std::string & path) {
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

void write_cold(const model & m, const std::vector<int32_t> & ids, const std::string & fp, const std::string & path) {
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
void write_predictor(const model & m, const std::string & fp, const std::string & path) {
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

// The same with the signs of the matrix alone, and a threshold that names about as many neurons as it leaves out.
void write_sign_predictor(const model & m, const std::string & fp, const std::string & path) {
    writer w;
    add_common(w.gguf, "predictor", m.c, fp);
    const char *   kind = "one_bit";
    const uint32_t rank = N_EMBD;
    gguf_set_arr_str(w.gguf, "pinfer.predictor.kind", &kind, 1);
    gguf_set_arr_data(w.gguf, "pinfer.predictor.rank", GGUF_TYPE_UINT32, &rank, 1);
    const matrix &       first = m.c.gated() ? m.gate : m.up;
    std::vector<int8_t>  bits((size_t) (N_EMBD / 8 * N_FF));
    std::vector<float>   t((size_t) N_FF);
    for (size_t j = 0; j < (size_t) (N_EMBD * N_FF); j++) {
        bits[j / 8] = (int8_t) (bits[j / 8] | (first.value[j] > 0.0f) << (j % 8));
    }
    w.add("blk.0.pred_b", GGML_TYPE_I8, N_EMBD / 8, N_FF, bits.data());
    w.add("blk.0.pred_t", GGML_TYPE_F32, N_FF, 1, t.data());
    w.write(path);
}

// Neurons that the sign predictor should name for these tokens, of those whose score is not too near zero to tell.
void check_sign_predictor(const model & m, const std::vector<float> & x, int64_t n_tokens, uint64_t n_candidates,
                          const std::string & name) {
    const matrix & first = m.c.gated() ? m.gate : m.up;
    uint64_t       sure = 0, unsure = 0;
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t i = 0; i < N_FF; i++) {
            double score = 0.0, size = 0.0;
            for (int64_t j = 0; j < N_EMBD; j++) {
                const double v = x[(size_t) (t * N_EMBD + j)];
                score += first.value[(size_t) (i * N_EMBD + j)] > 0.0f ? v : -v;
                size += v * v;
            }
            sure += score > 0.04 * std::sqrt(size);
            unsure += std::fabs(score) <= 0.04 * std::sqrt(size);
        }
    }
    check(n_candidates >= sure && n_candidates <= sure + unsure,
          name + ": " + std::to_string(n_candidates) + " named, expected " + std::to_string(sure) + " to " +
              std::to_string(sure + unsure));
}

ggml_tensor * named(ggml_tensor * t, const char * name) {
    ggml_set_name(t, name);
    return t;
}

// What libllama builds: for architectures with another activation (SwiGLU, GELU), or with that of the case, there spelled
// in two nodes where it is gated.
enum graph_kind { GRAPH_STOCK, GRAPH_NATIVE, GRAPH_SPELLED };

ggml_tensor * activation_nodes(ggml_context * ctx, const ffn_case & c, graph_kind kind, ggml_tensor * gate, ggml_tensor * up) {
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
std::vector<float> run_graph(const model & m, const std::vector<float> & x, int64_t n_tokens, int n_threads,
                             graph_kind kind = GRAPH_STOCK, bool node_by_node = false) {
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
    ggml_backend_buffer_t weights = ggml_backend_alloc_ctx_tensors(wctx, pinfer);
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
    check(ggml_backend_sched_graph_compute(sched, graph) == GGML_STATUS_SUCCESS, "graph compute");
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

double nmse(const std::vector<float> & a, const std::vector<double> & b) {
    double err = 0, norm = 0;
    for (size_t i = 0; i < b.size(); i++) {
        err += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return err / norm;
}

// Rounding x (and, in dense products, h) to the type's partner: F16 keeps 11 bits; a Q8 block of normal values has an error
// of about 3.2/127/sqrt(12) = 0.7 % a value, so 5e-5 a product, and three products are chained at most; doubled for luck of x.
double tolerance(ggml_type type) {
    return type == GGML_TYPE_F32 ? 1e-11 : type == GGML_TYPE_F16 ? 1e-6 : 3e-4;
}

bool configure(const shard_paths & p, const ffn_case & c, bool shards, bool predicted, std::string * err) {
    const pinfer_params params = {
        .model_path           = p.model.c_str(),
        .predictor_path       = predicted ? p.predictor.c_str() : nullptr,
        .hot_path             = shards ? p.hot.c_str() : nullptr,
        .cold_path            = shards ? p.cold.c_str() : nullptr,
        .device               = "CPU",
        .activation           = c.act,
        .n_batch_dense        = 0,
        .activation_threshold = c.threshold,
    };
    char text[512] = "";
    const bool ok = pinfer_configure(&params, text, sizeof(text));
    *err          = text;
    return ok;
}

std::string describe(const ffn_case & c, int64_t n_tokens, int n_threads, int hot, bool predicted) {
    char text[160];
    snprintf(text, sizeof(text), "%s above %g %s%s tokens %d threads %d %s%s", pinfer_activation_name(c.act),
             (double) c.threshold, ggml_type_name(c.type), c.biases ? " biases" : "", (int) n_tokens, n_threads,
             hot < 0 ? "model" : ("hot " + std::to_string(hot) + "%").c_str(), predicted ? " predicted" : "");
    return text;
}

// Any GGUF serves as the model that artefacts belong to; returns its fingerprint.
std::string write_model(const model & m, const shard_paths & p) {
    std::string fp, err;
    writer      w;
    gguf_set_val_str(w.gguf, "general.architecture", "test");
    w.add("up", m.c.type, N_EMBD, N_FF, m.up.data.data());
    w.write(p.model);
    check(pinfer_fingerprint_file(p.model.c_str(), &fp, &err), "fingerprint " + err);
    return fp;
}

// So many percent of the neurons are hot, the first ones of the order.
void write_shards(const model & m, const std::vector<int32_t> & order, int hot, const std::string & fp, const shard_paths & p) {
    const auto cut = order.begin() + (ptrdiff_t) (N_FF * hot / 100);
    write_hot(m, {order.begin(), cut}, fp, p.hot);
    write_cold(m, {cut, order.end()}, fp, p.cold);
}

void run_case(const ffn_case & c, const shard_paths & p) {
    const model       m  = make_model(c);
    const std::string fp = write_model(m, p);
    std::string       err;
    write_predictor(m, fp, p.predictor);

    std::vector<int32_t> order((size_t) N_FF);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);

    struct batch {
        int64_t             n_tokens;
        std::vector<float>  x;
        std::vector<double> want;
        uint64_t            active;
    };
    std::vector<batch> batches;
    for (int64_t n_tokens : {1, 7, 40, 70}) {
        batch b = {.n_tokens = n_tokens, .x = noise(N_EMBD * n_tokens, 1.0f), .want = {}, .active = 0};
        b.want  = reference(m, b.x, n_tokens, &b.active);
        batches.push_back(b);
    }
    for (int hot : {-1, 0, 50, 100}) {
        if (hot >= 0) {
            write_shards(m, order, hot, fp, p);
        }
        for (bool predicted : {false, true}) {
            check(configure(p, c, hot >= 0, predicted, &err), "configure: " + err);
            for (const auto & [n_tokens, x, want, active] : batches) {
                for (int n_threads : {1, 2}) {
                    pinfer_stats_reset();
                    const std::string name = describe(c, n_tokens, n_threads, hot, predicted);
                    const auto        got  = run_graph(m, x, n_tokens, n_threads);
                    check(nmse(got, want) <= tolerance(c.type), name + ": nmse " + std::to_string(nmse(got, want)));
                    check(got == run_graph(m, x, n_tokens, n_threads), name + ": two runs differ");
                    pinfer_stats st;
                    pinfer_get_stats(&st);
                    check(st.n_fallback == 0, name + ": fell back");
                    check(n_tokens < 64 ? st.n_tokens == 2u * (uint64_t) n_tokens : st.n_tokens_dense == 2u * (uint64_t) n_tokens,
                          name + ": wrong path");
                    if (n_tokens < 64 && hot <= 0) {
                        // a quantised x may tip a handful of neurons near zero
                        check(std::llabs((long long) st.n_active / 2 - (long long) active) <= (long long) (2 + active / 50),
                              name + ": active " + std::to_string(st.n_active / 2) + ", expected " + std::to_string(active));
                        check(!predicted || st.n_candidates < st.n_neurons * 3 / 4, name + ": predictor names nearly all");
                    }
                }
            }
        }
    }
}

void test_sign_predictor(const shard_paths & p) {
    const ffn_case c = {.act = PINFER_ACT_RELU2, .biases = false, .type = GGML_TYPE_Q4_0};
    const model    m = make_model(c);
    std::string    fp = write_model(m, p), err;
    write_sign_predictor(m, fp, p.predictor);
    std::vector<int32_t> order((size_t) N_FF);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    write_hot(m, {}, fp, p.hot);
    write_cold(m, order, fp, p.cold);
    for (bool shards : {false, true}) {
        check(configure(p, c, shards, true, &err), "configure: " + err);
        for (int64_t n_tokens : {1, 7}) {
            const std::vector<float> x = noise(N_EMBD * n_tokens, 1.0f);
            pinfer_stats_reset();
            run_graph(m, x, n_tokens, 2);
            pinfer_stats st;
            pinfer_get_stats(&st);
            check_sign_predictor(m, x, n_tokens, st.n_candidates, std::string("signs, ") + (shards ? "shards, " : "model, ") +
                                                                      std::to_string(n_tokens) + " tokens");
        }
    }
}

// Where nodes come one at a time no FFN is whole: the CPU backend multiplies, and the activation is still the model's.
void test_node_by_node(const shard_paths & p) {
    for (float threshold : {0.0f, 0.5f}) {
        for (pinfer_activation act : {PINFER_ACT_RELU, PINFER_ACT_RELU2, PINFER_ACT_DRELU, PINFER_ACT_REGLU}) {
            for (graph_kind kind : {GRAPH_STOCK, GRAPH_NATIVE, GRAPH_SPELLED}) {
                const ffn_case           c      = {.act = act, .biases = true, .type = GGML_TYPE_F32, .threshold = threshold};
                const model              m      = make_model(c);
                const std::vector<float> x      = noise(N_EMBD * 3, 1.0f);
                uint64_t                 active = 0;
                std::string              err;
                check(configure(p, c, false, false, &err), "configure: " + err);
                const auto   want  = reference(m, x, 3, &active);
                const double error = nmse(run_graph(m, x, 3, 2, kind, true), want);
                check(error <= tolerance(c.type), describe(c, 3, 2, -1, false) + " node by node: nmse " + std::to_string(error));
                pinfer_stats st;
                pinfer_get_stats(&st);
                check(st.n_fallback > 0, "node by node: nothing fell back");
            }
        }
    }
}

// What equals the threshold is zero and the next number is not, to the last bit, wherever it is computed.
void test_threshold_is_exact(const shard_paths & p) {
    const float t        = 0.3f;
    const float values[] = {t, std::nextafter(t, 1.0f), std::nextafter(t, 0.0f), 2 * t, -t, 0.0f};
    for (pinfer_activation act : {PINFER_ACT_RELU, PINFER_ACT_RELU2, PINFER_ACT_DRELU, PINFER_ACT_REGLU}) {
        const ffn_case     c = {.act = act, .biases = false, .type = GGML_TYPE_F32, .threshold = t};
        model              m = make_model(c);
        std::vector<float> first((size_t) (N_EMBD * N_FF)), one(first.size()), down(first.size());
        for (int64_t i = 0; i < N_FF; i++) { // neuron i has values[i % 6] for x = (1, 0, ...), and is output i
            first[(size_t) (i * N_EMBD)] = values[i % 6];
            one[(size_t) (i * N_EMBD)]   = 1.0f;
            if (i < N_EMBD) {
                down[(size_t) (i * N_FF + i)] = 1.0f;
            }
        }
        m.gate = quantised(c.type, N_EMBD, N_FF, first);
        m.up   = quantised(c.type, N_EMBD, N_FF, act == PINFER_ACT_REGLU ? one : first);
        m.down = quantised(c.type, N_FF, N_EMBD, down);
        const std::string    fp = write_model(m, p);
        std::vector<int32_t> order((size_t) N_FF);
        std::iota(order.begin(), order.end(), 0);
        for (int hot : {-1, 0, 50, 100}) {
            if (hot >= 0) {
                write_shards(m, order, hot, fp, p);
            }
            std::string err;
            check(configure(p, c, hot >= 0, false, &err), "configure: " + err);
            for (int64_t n_tokens : {1, 7, 70}) {
                std::vector<float> x((size_t) (N_EMBD * n_tokens));
                for (int64_t k = 0; k < n_tokens; k++) {
                    x[(size_t) (k * N_EMBD)] = 1.0f;
                }
                const auto got = run_graph(m, x, n_tokens, 2);
                for (size_t k = 0; k < got.size(); k++) {
                    const float v    = values[k % (size_t) N_EMBD % 6], h = v > t ? v : 0.0f;
                    const float want = act == PINFER_ACT_RELU || act == PINFER_ACT_REGLU ? h : h * h;
                    check(got[k] == want, describe(c, n_tokens, 2, hot, false) + ": " + std::to_string(got[k]) + " where " +
                                              std::to_string(want) + " is exact");
                }
            }
        }
    }
}

// A tensor of zeros in a cold shard.
struct cold_tensor {
    std::string name;
    ggml_type   type;
    int64_t     ne0, ne1;
};

void write_zeros(const std::vector<cold_tensor> & tensors, const ffn_case & c, const std::vector<int32_t> & ids,
                 const std::string & fp, const std::string & path) {
    writer w;
    add_common(w.gguf, "cold", c, fp);
    w.add("blk.0.neurons", GGML_TYPE_I32, (int64_t) ids.size(), 1, ids.data());
    for (const cold_tensor & t : tensors) {
        const std::vector<uint8_t> zeros(ggml_row_size(t.type, t.ne0) * (size_t) t.ne1);
        w.add(("blk.0." + t.name).c_str(), t.type, t.ne0, t.ne1, zeros.data());
    }
    w.write(path);
}

// Artefacts made under another activation or threshold are refused, and thresholds that make no sense.
void test_other_activations(const shard_paths & p, model m, const std::vector<int32_t> & cold, const std::vector<int32_t> & hot,
                            const std::string & fp) {
    const ffn_case run  = m.c;
    const auto     made = [&](const ffn_case & c) {
        m.c = c;
        write_hot(m, hot, fp, p.hot);
        write_cold(m, cold, fp, p.cold);
        write_predictor(m, fp, p.predictor);
    };
    std::string err;
    ffn_case    other = run;
    other.threshold   = 0.01f;
    made(other);
    check(configure(p, other, true, true, &err), "artefacts of the same threshold: " + err);
    check(!configure(p, run, true, true, &err) &&
              err == "predictor.gguf was made for activation reglu above 0.01, model.gguf is run with reglu; make it anew with: "
                     "pinfer train model.gguf",
          "artefacts of a threshold: " + err);
    check(!configure(p, run, true, false, &err) && err.find("cold.gguf was made for") == 0, "cold shard of a threshold: " + err);
    made(run);
    check(!configure(p, other, true, false, &err), "artefacts of no threshold");
    other.act = PINFER_ACT_DRELU;
    made(other);
    check(!configure(p, run, true, true, &err) && err.find("activation drelu above 0.01") != std::string::npos, "drelu: " + err);

    for (float bad : {-1.0f, NAN, INFINITY}) {
        other           = run;
        other.threshold = bad;
        check(!configure(p, other, false, false, &err) && err.find("threshold must be 0 or more") != std::string::npos, "bad: " + err);
    }
    other = {.act = PINFER_ACT_GRAPH, .biases = false, .type = GGML_TYPE_F32, .threshold = 0.5f};
    check(!configure(p, other, false, false, &err), "a threshold for whatever the graph says");
}

// Damaged or foreign artefacts are refused with one line that says what to type.
void test_refusals(const shard_paths & p) {
    const ffn_case c = {.act = PINFER_ACT_REGLU, .biases = false, .type = GGML_TYPE_F16};
    const model    m = make_model(c);
    std::string    fp, err;
    check(pinfer_fingerprint_file(p.model.c_str(), &fp, &err), "fingerprint " + err);
    std::vector<int32_t> hot((size_t) N_FF / 4), cold((size_t) (N_FF - N_FF / 4));
    std::iota(hot.begin(), hot.end(), 0);
    std::iota(cold.begin(), cold.end(), (int32_t) hot.size());
    write_hot(m, hot, fp, p.hot);
    write_cold(m, cold, fp, p.cold);
    write_predictor(m, fp, p.predictor);
    check(configure(p, c, true, true, &err), "whole shards: " + err);
    auto refused = [&](const std::string & what, const std::string & mend) {
        const bool accepted = configure(p, c, true, true, &err);
        const bool mends    = err.find(mend + " " + p.model) != std::string::npos && err.find('\n') == std::string::npos;
        check(!accepted && mends, what + ": " + (accepted ? "accepted" : err));
    };
    for (const std::string & path : {p.cold, p.hot, p.predictor}) {
        const std::string copy = path + ".whole";
        const auto        size = std::filesystem::file_size(path);
        std::filesystem::copy_file(path, copy, std::filesystem::copy_options::overwrite_existing);
        for (int i = 0; i < 20; i++) {
            std::filesystem::resize_file(path, size * (uintmax_t) i / 20);
            refused(path + " cut at " + std::to_string(i * 5) + " %", path == p.predictor ? "pinfer train" : "pinfer split");
            std::filesystem::copy_file(copy, path, std::filesystem::copy_options::overwrite_existing);
        }
    }

    const auto        n     = (int64_t) cold.size();
    const cold_tensor gate  = {"ffn_gate.weight", GGML_TYPE_F16, N_EMBD, n};
    const cold_tensor up    = {"ffn_up.weight", GGML_TYPE_F16, N_EMBD, n};
    const cold_tensor down  = {"ffn_down_t.weight", GGML_TYPE_Q8_0, N_EMBD, n};
    const cold_tensor bytes = {"cold", GGML_TYPE_I8, 6 * N_EMBD, n};
    write_zeros({gate, up, down}, c, cold, fp, p.cold);
    check(configure(p, c, true, true, &err), "rows of zeros: " + err);
    const std::pair<const char *, std::vector<cold_tensor>> odd[] = {
        {"no rows at all", {}},
        {"one tensor of bytes", {bytes}},
        {"no gate rows", {up, down}},
        {"no up rows", {gate, down}},
        {"no down rows", {gate, up}},
        {"gate rows of half the width", {{gate.name, gate.type, N_EMBD / 2, n}, up, down}},
        {"too few up rows", {gate, {up.name, up.type, N_EMBD, n - 1}, down}},
        {"down not transposed", {gate, up, {down.name, GGML_TYPE_F32, n, N_EMBD}}},
        {"gate of numbers", {{gate.name, GGML_TYPE_I32, N_EMBD, n}, up, down}},
        {"down of activations", {gate, up, {down.name, GGML_TYPE_Q8_K, N_EMBD, n}}},
        {"too few biases", {gate, up, down, {"ffn_up.bias", GGML_TYPE_F32, n - 1, 1}}},
    };
    for (const auto & [what, tensors] : odd) {
        write_zeros(tensors, c, cold, fp, p.cold);
        refused(what, "pinfer split");
    }
    write_zeros({gate, up, down}, c, std::vector<int32_t>(cold.size(), (int32_t) N_FF), fp, p.cold);
    refused("neurons beyond the last", "pinfer split");
    write_cold(m, cold, fp, p.cold);
    write_predictor(m, "ffffffffffffffffffffffffffffffff", p.predictor);
    refused("predictor of another model", "pinfer train");
    test_other_activations(p, m, cold, hot, fp);
}

} // namespace

int main() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr); // gguf explains every refused file
    std::string folder = std::filesystem::temp_directory_path() / "pinfer-test-XXXXXX";
    if (!mkdtemp(folder.data())) {
        printf("no temporary folder\n");
        return 1;
    }
    std::filesystem::current_path(folder);
    const shard_paths p      = {.model = "model.gguf", .hot = "hot.gguf", .cold = "cold.gguf", .predictor = "predictor.gguf"};

    int n = 0;
    for (pinfer_activation act : {PINFER_ACT_RELU, PINFER_ACT_RELU2, PINFER_ACT_DRELU, PINFER_ACT_REGLU}) {
        for (bool biases : {false, true}) {
            for (ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K}) {
                run_case({.act = act, .biases = biases, .type = type}, p);
                n++;
            }
            // a product that rounding tips over the threshold costs all of it: what quantised types explain needs a small one
            run_case({.act = act, .biases = biases, .type = GGML_TYPE_F32, .threshold = 0.5f}, p);
            run_case({.act = act, .biases = biases, .type = GGML_TYPE_Q4_K, .threshold = 0.1f}, p);
            n += 2;
        }
    }
    test_threshold_is_exact(p);
    test_sign_predictor(p);
    test_node_by_node(p);
    test_refusals(p);
    std::filesystem::remove_all(folder);
    printf("%d FFN kinds, %d failures\n", n, failures);
    return failures != 0;
}
