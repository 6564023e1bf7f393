// test_ffn.cpp: the plugin's FFN against a double-precision reference: every activation, with and without biases, gates and
// shards, on batches and thread counts, from the model's own matrices and from hot and cold shards on a second CPU device.
#include "ffn_case.h"

#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <unistd.h>

namespace {

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

// relu(A·x + c) holds every input as it is and negated, shifted and cut off; B counts the negated ones for less.
constexpr int64_t MLP_RANK  = 2 * N_EMBD;
constexpr float   MLP_SHIFT = 0.4f, MLP_LESS = 0.75f;

std::vector<float> mlp_factor(const model & m, bool first) {
    const matrix &     w = m.c.gated() ? m.gate : m.up;
    std::vector<float> f((size_t) (first ? MLP_RANK * N_EMBD : N_FF * MLP_RANK), 0.0f);
    for (int64_t i = 0; first && i < N_EMBD; i++) {
        f[(size_t) (i * N_EMBD + i)]            = 1.0f;
        f[(size_t) ((N_EMBD + i) * N_EMBD + i)] = -1.0f;
    }
    for (int64_t i = 0; !first && i < N_FF; i++) {
        for (int64_t j = 0; j < N_EMBD; j++) {
            f[(size_t) (i * MLP_RANK + j)]          = w.value[(size_t) (i * N_EMBD + j)];
            f[(size_t) (i * MLP_RANK + N_EMBD + j)] = -MLP_LESS * w.value[(size_t) (i * N_EMBD + j)];
        }
    }
    return f;
}

std::vector<uint8_t> in_type(const std::vector<float> & values, ggml_type type, int64_t row) {
    std::vector<uint8_t> out(ggml_row_size(type, row) * values.size() / (size_t) row);
    ggml_quantize_chunk(type, values.data(), out.data(), 0, (int64_t) values.size() / row, row, nullptr);
    return out;
}

void write_mlp_predictor(const model & m, ggml_type type, const std::string & fp, const std::string & path) {
    writer w;
    add_common(w.gguf, "predictor", m.c, fp);
    const char *   kind = "mlp";
    const uint32_t rank = MLP_RANK;
    gguf_set_arr_str(w.gguf, "pinfer.predictor.kind", &kind, 1);
    gguf_set_arr_data(w.gguf, "pinfer.predictor.rank", GGUF_TYPE_UINT32, &rank, 1);
    const std::vector<float> c((size_t) MLP_RANK, MLP_SHIFT), t((size_t) N_FF, 0.0f);
    w.add("blk.0.pred_a", type, N_EMBD, MLP_RANK, in_type(mlp_factor(m, true), type, N_EMBD).data());
    w.add("blk.0.pred_b", type, MLP_RANK, N_FF, in_type(mlp_factor(m, false), type, MLP_RANK).data());
    w.add("blk.0.pred_c", GGML_TYPE_F32, MLP_RANK, 1, c.data());
    w.add("blk.0.pred_t", GGML_TYPE_F32, N_FF, 1, t.data());
    w.write(path);
}

// Factors of every type name the neurons whose score, computed here in double, is not too near zero for the type to tell.
void test_mlp_predictor(const shard_paths & p) {
    const ffn_case c = {.act = PINFER_ACT_RELU2, .biases = false, .type = GGML_TYPE_F16};
    const model    m = make_model(c);
    std::string    fp = write_model(m, p), err;
    const std::vector<float> b = mlp_factor(m, false);
    const std::pair<ggml_type, double> errors[] = {
        {GGML_TYPE_F32, 1e-5}, {GGML_TYPE_F16, 1e-3}, {GGML_TYPE_Q8_0, 0.02}, {GGML_TYPE_Q4_0, 0.15}};
    for (const auto & [type, error] : errors) {
        write_mlp_predictor(m, type, fp, p.predictor);
        check(configure(p, c, false, true, &err), "configure: " + err);
        for (int64_t n_tokens : {1, 5, 7}) {
            const std::vector<float> x = noise(N_EMBD * n_tokens, 1.0f);
            pinfer_stats_reset(nullptr);
            run_graph(m, x, n_tokens, 2);
            pinfer_stats st;
            pinfer_get_stats(nullptr, &st);
            uint64_t sure = 0, unsure = 0;
            for (int64_t t = 0; t < n_tokens; t++) {
                for (int64_t i = 0; i < N_FF; i++) {
                    double score = 0.0, rows = 0.0, hidden = 0.0;
                    for (int64_t j = 0; j < MLP_RANK; j++) {
                        const double v = x[(size_t) (t * N_EMBD + j % N_EMBD)];
                        const double h = std::max(0.0, (j < N_EMBD ? v : -v) + MLP_SHIFT);
                        const double w = b[(size_t) (i * MLP_RANK + j)];
                        score += w * h;
                        rows += w * w;
                        hidden += h * h;
                    }
                    const double slack = error * std::sqrt(rows * hidden);
                    sure += score > slack;
                    unsure += std::fabs(score) <= slack;
                }
            }
            check(st.n_candidates >= sure && st.n_candidates <= sure + unsure && sure > 0,
                  std::string("mlp of ") + ggml_type_name(type) + ", " + std::to_string(n_tokens) + " tokens: " +
                      std::to_string(st.n_candidates) + " named, expected " + std::to_string(sure) + " to " +
                      std::to_string(sure + unsure));
        }
    }
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
                    pinfer_stats_reset(nullptr);
                    const std::string name = describe(c, n_tokens, n_threads, hot, predicted);
                    const auto        got  = run_graph(m, x, n_tokens, n_threads);
                    check(nmse(got, want) <= tolerance(c.type), name + ": nmse " + std::to_string(nmse(got, want)));
                    check(got == run_graph(m, x, n_tokens, n_threads), name + ": two runs differ");
                    pinfer_stats st;
                    pinfer_get_stats(nullptr, &st);
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
            pinfer_stats_reset(nullptr);
            run_graph(m, x, n_tokens, 2);
            pinfer_stats st;
            pinfer_get_stats(nullptr, &st);
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
                write_model(m, p);
                check(configure(p, c, false, false, &err), "configure: " + err);
                const auto   want  = reference(m, x, 3, &active);
                const double error = nmse(run_graph(m, x, 3, 2, kind, true), want);
                check(error <= tolerance(c.type), describe(c, 3, 2, -1, false) + " node by node: nmse " + std::to_string(error));
                pinfer_stats st;
                pinfer_get_stats(nullptr, &st);
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
              err == "predictor.gguf was made for activation reglu above 0.01, model.gguf is run with reglu; make it again: "
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
    std::string    err;
    const auto     fp = write_model(m, p);
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
    test_mlp_predictor(p);
    test_node_by_node(p);
    test_refusals(p);
    std::filesystem::remove_all(folder);
    printf("%d FFN kinds, %d failures\n", n, failures);
    return failures != 0;
}
