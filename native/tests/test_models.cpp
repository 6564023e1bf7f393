// test_models.cpp: several models in one process: each computes by its own artefacts, at the same time; a model holds one set of
// devices; what does not belong together is refused; and no lack of memory ends the program.
#include "fake_device.h"
#include "ffn_case.h"

#include "buffer.h"
#include "match.h"

#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <thread>

// --- memory that runs out when it is told to ------------------------------------------------------------------------------

static thread_local long allocations_left = -1; // -1: no end

static void * allocate(size_t size) {
    if (allocations_left == 0) {
        throw std::bad_alloc();
    }
    allocations_left -= allocations_left > 0;
    void * const p = malloc(size ? size : 1);
    if (!p) {
        throw std::bad_alloc();
    }
    return p;
}

void * operator new(size_t size) { return allocate(size); }
void * operator new[](size_t size) { return allocate(size); }
void * operator new(size_t size, const std::nothrow_t &) noexcept { return malloc(size ? size : 1); }
void * operator new[](size_t size, const std::nothrow_t &) noexcept { return malloc(size ? size : 1); }
void   operator delete(void * p) noexcept { free(p); }
void   operator delete[](void * p) noexcept { free(p); }
void   operator delete(void * p, size_t) noexcept { free(p); }
void   operator delete[](void * p, size_t) noexcept { free(p); }

namespace {

fake_device calls = {.name = "CALLS", .queued = false, .pinned = false};

// A model with its shards under a name of its own.
struct placed_model {
    shard_paths p;
    model       m;

    placed_model(const std::string & name, const ffn_case & c, int hot) : m(make_model(c)) {
        p = {.model = name + ".gguf", .hot = name + "-hot.gguf", .cold = name + "-cold.gguf", .predictor = name + "-predictor.gguf"};
        std::vector<int32_t> order((size_t) N_FF);
        std::iota(order.begin(), order.end(), 0);
        const std::string fp = write_model(m, p);
        write_shards(m, order, hot, fp, p);
        write_predictor(m, fp, p.predictor);
    }

    bool configure(const char * device, std::string * err) const {
        const char * const hot[]     = {p.hot.c_str(), nullptr};
        const char * const devices[] = {device, nullptr};
        const pinfer_params params   = {
            .model_path           = p.model.c_str(),
            .predictor_path       = p.predictor.c_str(),
            .hot_paths            = hot,
            .cold_path            = p.cold.c_str(),
            .devices              = devices,
            .activation           = m.c.act,
            .n_batch_dense        = 0,
            .activation_threshold = m.c.threshold,
        };
        char       text[512] = "";
        const bool ok        = pinfer_configure(&params, text, sizeof(text));
        *err                 = text;
        return ok;
    }

    std::vector<float> run(const std::vector<float> & x, int64_t n_tokens) const {
        return run_graph(m, x, n_tokens, 1, GRAPH_STOCK, false, GGML_STATUS_SUCCESS, p.model.c_str());
    }
};

// Two threads, two models, one of them with a device that a thread of its own drives.
void test_two_at_the_same_time(int rounds) {
    const placed_model        one("one", {PINFER_ACT_REGLU, true, GGML_TYPE_F32}, 50), other("other", {PINFER_ACT_RELU2, false, GGML_TYPE_F32}, 25);
    const auto                x = noise(N_EMBD * 7, 1.0f);
    std::string               err;
    check(one.configure("CALLS", &err), "one: " + err);
    check(other.configure("CPU", &err), "other: " + err);
    const auto want_one = one.run(x, 7), want_other = other.run(x, 7);
    uint64_t   active = 0;
    check(nmse(want_one, reference(one.m, x, 7, &active)) <= tolerance(GGML_TYPE_F32), "one by itself");
    check(nmse(want_other, reference(other.m, x, 7, &active)) <= tolerance(GGML_TYPE_F32), "other by itself");
    std::atomic<int> wrong{0};
    const auto       work = [&](const placed_model & m, const std::vector<float> & want) {
        for (int i = 0; i < rounds; i++) {
            wrong += m.run(x, 7) != want;
        }
    };
    std::thread first([&] { work(one, want_one); }), second([&] { work(other, want_other); });
    pinfer_stats st;
    while (pinfer_get_stats(nullptr, &st), st.n_tokens < (uint64_t) rounds) { // read while they compute
        char text[256];
        pinfer_devices_at_work(text, sizeof(text));
    }
    first.join();
    second.join();
    check(wrong == 0, "at the same time: " + std::to_string(wrong) + " of " + std::to_string(2 * rounds) + " runs differ");
    pinfer_stats a, b;
    pinfer_get_stats(one.p.model.c_str(), &a);
    pinfer_get_stats(other.p.model.c_str(), &b);
    check(a.n_tokens == 7u * (uint64_t) (rounds + 1) && b.n_tokens == a.n_tokens && a.n_hot > b.n_hot, "counters of each");
}

// Reconfiguring closes the old devices first, and what only a device refuses leaves the model unconfigured.
void test_one_set_of_devices() {
    const placed_model m("one", {PINFER_ACT_RELU, false, GGML_TYPE_F32}, 50);
    std::string        err;
    check(m.configure("CALLS", &err), "first: " + err);
    calls.most_open = calls.n_open;
    for (int i = 0; i < 3; i++) {
        check(m.configure("CALLS", &err), "again: " + err);
    }
    check(calls.n_open == 1 && calls.most_open == 1, "never two: " + std::to_string(calls.most_open));
    std::filesystem::rename(m.p.cold, "away");
    check(!m.configure("CALLS", &err) && calls.n_open == 1, "a missing file leaves the earlier configuration");
    std::filesystem::rename("away", m.p.cold);
    calls.fault = FAKE_CANNOT_MULTIPLY;
    check(!m.configure("CALLS", &err) && calls.n_open == 0 && !pinfer_model_of(m.p.model.c_str()), "a device that refuses: " + err);
    calls.fault = FAKE_WORKS;
    check(m.configure("CALLS", &err) && calls.n_open == 1, "and then one that works");
    pinfer_release(m.p.model.c_str());
    check(calls.n_open == 0, "a released model frees its devices");
}

// The FFN by itself, in host memory, so that only the plugin allocates while it is computed.
struct bare_ffn {
    ggml_backend_t        pinfer = ggml_backend_dev_init(ggml_backend_reg_dev_get(ggml_backend_init(), 0), nullptr);
    ggml_context *        weights, * ctx;
    ggml_backend_buffer_t weight_buffer, node_buffer;
    ggml_tensor *         x, * y;
    ggml_cgraph *         graph;

    bare_ffn(const placed_model & m, int64_t n_tokens, ggml_type bias_type = GGML_TYPE_F32) {
        weights           = ggml_init({.mem_size = ggml_tensor_overhead() * 8, .mem_buffer = nullptr, .no_alloc = true});
        ggml_tensor * up  = named(ggml_new_tensor_2d(weights, m.m.c.type, N_EMBD, N_FF), "blk.0.ffn_up.weight");
        ggml_tensor * dn  = named(ggml_new_tensor_2d(weights, m.m.c.type, N_FF, N_EMBD), "blk.0.ffn_down.weight");
        ggml_tensor * ub  = m.m.c.biases ? named(ggml_new_tensor_1d(weights, bias_type, N_FF), "blk.0.ffn_up.bias") : nullptr;
        ggml_tensor * db  = m.m.c.biases ? named(ggml_new_tensor_1d(weights, bias_type, N_EMBD), "blk.0.ffn_down.bias") : nullptr;
        const int     fd  = open(m.p.model.c_str(), O_RDONLY);
        ggml_backend_dev_supports_op(ggml_backend_get_device(pinfer), up);
        weight_buffer = ggml_backend_alloc_ctx_tensors(weights, pinfer);
        close(fd);
        ggml_backend_tensor_set(up, m.m.up.data.data(), 0, ggml_nbytes(up));
        ggml_backend_tensor_set(dn, m.m.down.data.data(), 0, ggml_nbytes(dn));
        const auto set_bias = [&](ggml_tensor * t, const std::vector<float> & v) {
            std::vector<ggml_fp16_t> half(v.size());
            ggml_fp32_to_fp16_row(v.data(), half.data(), (int64_t) v.size());
            ggml_backend_tensor_set(t, t->type == GGML_TYPE_F16 ? (const void *) half.data() : v.data(), 0, ggml_nbytes(t));
        };
        if (ub) {
            set_bias(ub, m.m.up_bias);
            set_bias(db, m.m.down_bias);
        }
        ctx = ggml_init({.mem_size = ggml_tensor_overhead() * 16 + ggml_graph_overhead(), .mem_buffer = nullptr, .no_alloc = true});
        x   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_EMBD, n_tokens);
        ggml_tensor * u = ggml_mul_mat(ctx, up, x);
        u               = ub ? ggml_add(ctx, u, ub) : u;
        h               = ggml_sqr(ctx, ggml_relu(ctx, u));
        y               = ggml_mul_mat(ctx, dn, h);
        y               = db ? ggml_add(ctx, y, db) : y;
        graph           = ggml_new_graph(ctx);
    }

    ggml_tensor * h;

    ggml_status compute(const std::vector<float> & in) {
        if (ggml_graph_n_nodes(graph) == 0) {
            ggml_build_forward_expand(graph, y);
            node_buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
        }
        ggml_backend_tensor_set(x, in.data(), 0, ggml_nbytes(x));
        return ggml_backend_graph_compute(pinfer, graph);
    }

    std::vector<float> values(const ggml_tensor * t) const {
        std::vector<float> out((size_t) ggml_nelements(t));
        ggml_backend_tensor_get(t, out.data(), 0, ggml_nbytes(t));
        return out;
    }

    ~bare_ffn() {
        ggml_backend_buffer_free(node_buffer);
        ggml_backend_buffer_free(weight_buffer);
        ggml_free(ctx);
        ggml_free(weights);
        ggml_backend_free(pinfer);
    }
};

// Whichever allocation fails, the FFN fails or is right, its devices are done, and the next one is computed.
void test_out_of_memory() {
    for (const char * device : {"CALLS", "CPU"}) {
        const placed_model m("one", {PINFER_ACT_RELU2, false, GGML_TYPE_F32}, 50);
        std::string        err;
        uint64_t           active = 0;
        check(m.configure(device, &err), "configure: " + err);
        for (const int64_t n_tokens : {(int64_t) 1, (int64_t) 100}) {
            const auto x    = noise(N_EMBD * n_tokens, 1.0f);
            const auto want = reference(m.m, x, n_tokens, &active);
            int        failed = 0;
            for (long n = 0; n < 200; n++) {
                bare_ffn f(m, n_tokens);
                f.compute(x); // what is kept from call to call is there, so that the failures below are those of every call
                allocations_left         = n;
                const ggml_status status = ggml_backend_graph_compute(f.pinfer, f.graph);
                const bool        spent  = allocations_left == 0;
                allocations_left         = -1;
                failed += status != GGML_STATUS_SUCCESS;
                check(status != GGML_STATUS_SUCCESS || nmse(f.values(f.y), want) <= tolerance(GGML_TYPE_F32), "wrong after a failure");
                check(f.compute(x) == GGML_STATUS_SUCCESS && nmse(f.values(f.y), want) <= tolerance(GGML_TYPE_F32), "the next FFN");
                if (!spent) {
                    break;
                }
            }
            check(failed > 0, "no allocation failed");
        }
        pinfer_release(m.p.model.c_str());
    }
}

// Biases that a file does not have in F32.
void test_biases_by_their_type() {
    const ffn_case     c = {PINFER_ACT_RELU2, true, GGML_TYPE_F32};
    const placed_model m("one", c, 0);
    std::string        err;
    uint64_t           active = 0;
    const auto         x = noise(N_EMBD * 3, 1.0f);
    placed_model       rounded = m;
    for (auto * bias : {&rounded.m.up_bias, &rounded.m.down_bias}) {
        for (float & v : *bias) {
            v = ggml_fp16_to_fp32(ggml_fp32_to_fp16(v));
        }
    }
    const auto want = reference(rounded.m, x, 3, &active);
    for (const bool shards : {false, true}) {
        check(::configure(m.p, c, false, shards, &err), "configure: " + err);
        bare_ffn f(m, 3, GGML_TYPE_F16);
        check(f.compute(x) == GGML_STATUS_SUCCESS, "biases in F16");
        const double error = nmse(f.values(f.y), want);
        check(error <= tolerance(GGML_TYPE_F32), "biases in F16: nmse " + std::to_string(error));
    }
}

// Where another node reads the activation, all of it is written, whatever the FFN was going to leave out.
void test_readers_of_the_activation() {
    const placed_model m("one", {PINFER_ACT_RELU2, false, GGML_TYPE_F32}, 50);
    std::string        err;
    uint64_t           active = 0;
    const auto         x = noise(N_EMBD, 1.0f);
    const auto         want = reference(m.m, x, 1, &active);
    check(m.configure("CPU", &err), "configure: " + err);
    bare_ffn f(m, 1);
    ggml_tensor * const reader = ggml_scale(f.ctx, f.h, 2.0f);
    ggml_build_forward_expand(f.graph, f.y);
    ggml_build_forward_expand(f.graph, reader);
    f.node_buffer = ggml_backend_alloc_ctx_tensors_from_buft(f.ctx, ggml_backend_cpu_buffer_type());
    std::vector<float> garbage((size_t) N_FF, 1e9f);
    ggml_backend_tensor_set(f.h, garbage.data(), 0, ggml_nbytes(f.h));
    check(f.compute(x) == GGML_STATUS_SUCCESS && nmse(f.values(f.y), want) <= tolerance(GGML_TYPE_F32), "the FFN beside its reader");
    const auto read = f.values(reader);
    double     error = 0.0, size = 0.0;
    for (int64_t i = 0; i < N_FF; i++) {
        const double h = 2.0 * reference_h(m.m, i, x.data());
        error += (read[(size_t) i] - h) * (read[(size_t) i] - h);
        size += h * h;
    }
    check(error <= 1e-10 * size, "what the reader of the activation got");
}

} // namespace

int main(int argc, char ** argv) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    std::string folder = std::filesystem::temp_directory_path() / "pinfer-test-XXXXXX";
    if (!mkdtemp(folder.data())) {
        printf("no temporary folder\n");
        return 1;
    }
    std::filesystem::current_path(folder);
    fake_register(&calls);
    test_two_at_the_same_time(argc > 1 ? atoi(argv[1]) : 50);
    test_one_set_of_devices();
    test_out_of_memory();
    test_biases_by_their_type();
    test_readers_of_the_activation();
    for (const auto & m : pinfer_models()) {
        pinfer_model_release(m->id);
    }
    std::filesystem::remove_all(folder);
    printf("models: %d failures\n", failures);
    return failures != 0;
}
