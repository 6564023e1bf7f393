// test_hot.cpp: hot neurons on several devices at once: that the sums are those of one, and the same in every run; that
// devices work at the same time, however they are driven; that they take the memory they say; and what is said of one that fails.
#include "fake_device.h"
#include "ffn_case.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <unistd.h>

namespace {

const shard_paths files = {.model = "model.gguf", .hot = "hot.gguf", .cold = "cold.gguf", .predictor = "predictor.gguf"};

fake_device queue  = {.name = "QUEUE", .queued = true, .pinned = false};
fake_device pinned = {.name = "PINNED", .queued = true, .pinned = true};
fake_device calls  = {.name = "CALLS", .queued = false, .pinned = false};
fake_device sync_pinned = {.name = "CALLSPINNED", .queued = false, .pinned = true};

// Percent of the neurons on each device; the rest is cold.
using shares = std::vector<int>;

std::string hot_path(size_t i) {
    return i == 0 ? files.hot : "hot-" + std::to_string(i) + ".gguf";
}

struct setup {
    ffn_case             c;
    model                m;
    std::string          fingerprint;
    std::vector<int32_t> order;

    explicit setup(const ffn_case & kind) : c(kind), m(make_model(kind)), fingerprint(write_model(m, files)), order((size_t) N_FF) {
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), rng);
        write_predictor(m, fingerprint, files.predictor);
    }

    void split(const shares & percent) const {
        auto at = order.begin();
        for (size_t i = 0; i < percent.size(); i++) {
            const auto end = at + (ptrdiff_t) (N_FF * percent[i] / 100);
            write_hot(m, {at, end}, fingerprint, hot_path(i));
            at = end;
        }
        write_cold(m, {at, order.end()}, fingerprint, files.cold);
    }

    bool open(size_t n_shards, const std::vector<const char *> & names, bool predicted, std::string * err) const {
        std::vector<std::string>  paths;
        std::vector<const char *> hot, devices = names;
        for (size_t i = 0; i < n_shards; i++) {
            paths.push_back(hot_path(i));
        }
        for (const std::string & path : paths) {
            hot.push_back(path.c_str());
        }
        hot.push_back(nullptr);
        devices.push_back(nullptr);
        const pinfer_params params = {
            .model_path           = files.model.c_str(),
            .predictor_path       = predicted ? files.predictor.c_str() : nullptr,
            .hot_paths            = hot.data(),
            .cold_path            = files.cold.c_str(),
            .devices              = names.empty() ? nullptr : devices.data(),
            .activation           = c.act,
            .n_batch_dense        = 0,
            .activation_threshold = c.threshold,
        };
        char       text[512] = "";
        const bool ok        = pinfer_configure(&params, text, sizeof(text));
        *err                 = text;
        return ok;
    }

    // Splits and opens.
    void place(const shares & percent, const std::vector<const char *> & names, bool predicted = false) const {
        std::string err;
        split(percent);
        check(open(percent.size(), names, predicted, &err), "configure: " + err);
    }
};

struct batch {
    int64_t             n_tokens;
    std::vector<float>  x;
    std::vector<double> want;
};

std::vector<batch> batches_of(const model & m, std::initializer_list<int64_t> sizes) {
    std::vector<batch> out;
    for (int64_t n : sizes) {
        uint64_t active = 0;
        batch    b      = {.n_tokens = n, .x = noise(N_EMBD * n, 1.0f), .want = {}};
        b.want          = reference(m, b.x, n, &active);
        out.push_back(b);
    }
    return out;
}

std::string describe(const setup & s, const shares & percent, int64_t n_tokens) {
    std::string text = std::string(pinfer_activation_name(s.c.act)) + " " + ggml_type_name(s.c.type) + " hot";
    for (int p : percent) {
        text += " " + std::to_string(p) + "%";
    }
    return text + " tokens " + std::to_string(n_tokens);
}

// Two CPU devices, at every share, against the reference; three runs are alike.
void test_two_devices() {
    for (const ffn_case & c : {ffn_case{PINFER_ACT_REGLU, true, GGML_TYPE_Q8_0}, ffn_case{PINFER_ACT_RELU2, false, GGML_TYPE_F16},
                               ffn_case{PINFER_ACT_DRELU, true, GGML_TYPE_F32, 0.5f}, ffn_case{PINFER_ACT_RELU, true, GGML_TYPE_F32}}) {
        const setup s(c);
        const auto  batches = batches_of(s.m, {1, 7, 512});
        for (const shares & percent : {shares{0, 0}, shares{25, 0}, shares{0, 25}, shares{25, 25}, shares{25, 50}, shares{50, 50}, shares{100, 0}}) {
            for (bool predicted : {false, true}) {
                s.place(percent, {"CPU", "CPU"}, predicted);
                for (const batch & b : batches) {
                    const std::string name = describe(s, percent, b.n_tokens);
                    const auto        got  = run_graph(s.m, b.x, b.n_tokens, 2);
                    check(nmse(got, b.want) <= tolerance(c.type), name + ": nmse " + std::to_string(nmse(got, b.want)));
                    for (int run = 0; run < 2; run++) {
                        check(got == run_graph(s.m, b.x, b.n_tokens, 2), name + ": runs differ");
                    }
                }
            }
        }
    }
}

// What is on one device of two, or driven in another way, is added in the same order: bit for bit the same.
void test_same_bits() {
    const setup s({PINFER_ACT_REGLU, true, GGML_TYPE_Q4_K});
    const auto  batches = batches_of(s.m, {1, 7, 300, 600});
    struct placed {
        shares                    percent;
        std::vector<const char *> names;
    };
    const std::vector<std::vector<placed>> alike = {
        {{{50}, {"CPU"}}, {{50, 0}, {"CPU", "CPU"}}, {{0, 50}, {"CPU", "QUEUE"}}, {{50}, {"QUEUE"}}, {{50}, {"PINNED"}},
         {{50}, {"CALLS"}}, {{50}, {"CALLSPINNED"}}, {{50, 0}, {}}},
        {{{25, 50}, {"CPU", "CPU"}}, {{25, 50}, {"QUEUE", "CALLS"}}, {{25, 50}, {"CALLS", "PINNED"}}, {{25, 50}, {"CPU", "CALLSPINNED"}},
         {{25, 50}, {"calls", "CPU"}}, {{25, 50}, {"QUEUE", "QUEUE"}}},
    };
    for (const auto & group : alike) {
        std::vector<std::vector<float>> first;
        for (const placed & p : group) {
            s.place(p.percent, p.names);
            for (size_t i = 0; i < batches.size(); i++) {
                const auto got = run_graph(s.m, batches[i].x, batches[i].n_tokens, 2);
                if (first.size() <= i) {
                    first.push_back(got);
                }
                check(got == first[i], describe(s, p.percent, batches[i].n_tokens) + " on " + (p.names.empty() ? "GPUs" : p.names[0]) +
                                           ": other bits than on the CPU");
            }
        }
    }
}

// Each device goes on only when the other has begun.
void test_at_the_same_time() {
    const setup s({PINFER_ACT_RELU, false, GGML_TYPE_F32});
    const auto  batches = batches_of(s.m, {1});
    for (fake_device * other : {&pinned, &calls}) {
        for (fake_device * one : {&queue, &sync_pinned}) {
            s.place({25, 50}, {one->name.c_str(), other->name.c_str()});
            fake_meeting meeting;
            meeting.wanted = 2;
            one->meeting = other->meeting = &meeting;
            pinfer_stats_reset(nullptr);
            check(nmse(run_graph(s.m, batches[0].x, 1, 2), batches[0].want) <= tolerance(s.c.type), "at the same time: nmse");
            check(!meeting.missed, one->name + " and " + other->name + " wait for each other");
            one->meeting = other->meeting = nullptr;
            pinfer_stats st;
            pinfer_get_stats(nullptr, &st);
            check(st.seconds_hot > 0 && st.seconds_cold > 0 && st.seconds_wait > 0 && st.seconds_copy > 0, "seconds are counted");
            // a thread may wake when this small cold part is done; a queue is at work once it is filled
            check((st.seconds_overlap > 0 || one != &queue) && st.seconds_overlap <= st.seconds_cold * 1.0001,
                  "the cold part runs beside the hot one");
        }
    }
}

// A graph is built once for a layer and a number of tokens, and its memory is what was said before.
void test_memory() {
    for (const ffn_case & c : {ffn_case{PINFER_ACT_REGLU, true, GGML_TYPE_Q8_0}, ffn_case{PINFER_ACT_RELU2, false, GGML_TYPE_F16},
                               ffn_case{PINFER_ACT_DRELU, true, GGML_TYPE_F32, 0.5f}, ffn_case{PINFER_ACT_REGLU, true, GGML_TYPE_F32, 0.5f},
                               ffn_case{PINFER_ACT_RELU, true, GGML_TYPE_F32, 0.5f}}) {
        const setup s(c);
        s.place({50, 25}, {"CPU", "QUEUE"});
        const uint64_t bytes[] = {pinfer_hot_shard_bytes(files.model.c_str(), 0), pinfer_hot_shard_bytes(files.model.c_str(), 1)};
        for (size_t i = 0; i < 2; i++) {
            const pinfer_hot & hot = *pinfer_model_of(files.model.c_str())->hot[i];
            const uint64_t     n   = (uint64_t) hot.ffns[0].n;
            check(hot.compute_size > 0 && hot.compute_size <= pinfer_hot_compute_bytes(N_EMBD, n),
                  std::string(pinfer_activation_name(c.act)) + ": compute buffer of " + std::to_string(hot.compute_size) + " bytes, " +
                      std::to_string(pinfer_hot_compute_bytes(N_EMBD, n)) + " said");
            check(bytes[i] == ggml_backend_buffer_get_size(hot.buffer) + hot.compute_size, "bytes of a shard");
        }
        for (int64_t n_tokens : {1, 2, 3, 4, 5, 6, 63, 64, 255, 256, 257, 700, 1}) {
            run_graph(s.m, noise(N_EMBD * n_tokens, 1.0f), n_tokens, 2);
        }
        pinfer_stats st;
        pinfer_get_stats(nullptr, &st);
        check(pinfer_hot_shard_bytes(files.model.c_str(), 0) == bytes[0] && pinfer_hot_shard_bytes(files.model.c_str(), 1) == bytes[1] && pinfer_hot_shard_bytes(files.model.c_str(), 2) == 0 &&
                  pinfer_hot_shard_bytes(files.model.c_str(), -1) == 0 && st.hot_bytes == bytes[0] + bytes[1], "memory has grown with the batch");
    }
    const setup s({PINFER_ACT_RELU, false, GGML_TYPE_F32});
    s.place({50}, {"QUEUE"});
    const auto x = noise(N_EMBD, 1.0f);
    run_graph(s.m, x, 1, 1);
    const pinfer_hot_ffn &        layer = pinfer_model_of(files.model.c_str())->hot[0]->ffns[0];
    const pinfer_hot_graph * const  kept  = layer.graphs.at(0).get();
    const ggml_tensor * const       node  = ggml_graph_node(kept->graph, 0);
    run_graph(s.m, noise(N_EMBD * 3, 1.0f), 3, 1);
    run_graph(s.m, x, 1, 1);
    check(layer.graphs.size() == 2 && layer.graphs[0].get() == kept && ggml_graph_node(kept->graph, 0) == node, "a graph is kept");
}

// A device that fails is named in one line, the others finish, and afterwards everything goes on.
void test_failure() {
    const setup s({PINFER_ACT_REGLU, false, GGML_TYPE_F32});
    const auto  batches = batches_of(s.m, {1, 300});
    char        why[512];
    check(!pinfer_devices_at_work(why, sizeof(why)), "nothing is at work");
    for (fake_device * broken : {&queue, &calls}) {
        fake_device * whole = broken == &queue ? &calls : &queue;
        s.place({25, 25}, {whole->name.c_str(), broken->name.c_str()});
        for (const batch & b : batches) {
            for (fake_fault fault : {FAKE_FAILS, FAKE_THROWS}) {
                broken->fault = fault;
                run_graph(s.m, b.x, b.n_tokens, 2, GRAPH_STOCK, false, GGML_STATUS_FAILED);
                const bool        told = pinfer_last_failure(nullptr, why, sizeof(why));
                const std::string want = "device " + broken->name + " failed in layer 0 (" +
                                         (fault == FAKE_THROWS ? "the cable was pulled)" : "GGML status: error (operation failed))");
                check(told && why == want, "told of a failure: " + std::string(why) + ", expected " + want);
                broken->fault = FAKE_WORKS;
                check(nmse(run_graph(s.m, b.x, b.n_tokens, 2), b.want) <= tolerance(s.c.type), "after a failure");
                check(!pinfer_last_failure(nullptr, why, sizeof(why)), "a failure that is over");
            }
        }
    }
}

// Shards and devices that do not belong together.
void test_refusals() {
    const setup s({PINFER_ACT_RELU, false, GGML_TYPE_F32});
    std::string err;
    const auto  refused = [&](size_t n, const std::vector<const char *> & names, const char * what) {
        const bool accepted = s.open(n, names, false, &err);
        check(!accepted && err.find(what) != std::string::npos && err.find('\n') == std::string::npos,
              std::string(what) + ": " + (accepted ? "accepted" : err));
    };
    s.split({25, 25});
    check(s.open(2, {"CPU", "QUEUE"}, false, &err), "two shards: " + err);
    refused(1, {"CPU"}, "exactly once");
    refused(2, {"CPU"}, "--hot-device");
    refused(2, {"CPU", "NONE"}, "no device named NONE");
    refused(2, {"CPU", "CPU", "CPU"}, "--hot-device");
    queue.fault = FAKE_CANNOT_MULTIPLY;
    refused(2, {"CPU", "QUEUE"}, "device QUEUE cannot compute MUL_MAT of f32");
    queue.fault = FAKE_WORKS;
    s.split({10, 10, 10, 10, 10, 10, 10});
    refused(7, {}, "GPUs");
    write_hot(s.m, {s.order.begin(), s.order.begin() + 100}, s.fingerprint, hot_path(1));
    refused(2, {"CPU", "CPU"}, "exactly once");
    std::filesystem::remove(hot_path(1));
    refused(2, {"CPU", "CPU"}, "hot-1.gguf");
}

// The trace of a run is there while it runs, and whole.
void test_trace() {
    const setup s({PINFER_ACT_RELU, false, GGML_TYPE_F32});
    setenv("PINFER_TRACE", "trace.json", 1);
    s.place({25, 25}, {"CPU", "QUEUE"});
    unsetenv("PINFER_TRACE");
    for (int64_t n_tokens : {1, 3, 300}) {
        run_graph(s.m, noise(N_EMBD * n_tokens, 1.0f), n_tokens, 1);
    }
    std::stringstream text;
    text << std::ifstream("trace.json").rdbuf();
    const std::string all   = text.str();
    const auto        count = [&](const std::string & what) {
        size_t n = 0;
        for (size_t at = all.find(what); at != std::string::npos; at = all.find(what, at + 1)) {
            n++;
        }
        return n;
    };
    check(all.compare(0, 3, "[\n{") == 0 && all.size() > 4 && all.compare(all.size() - 4, 4, "}\n]\n") == 0, "the trace is an array");
    check(count("\n]\n") == 1 && count("},\n{") + 1 == count("\"ph\""), "events of the trace stand apart");
    check(count("\"name\": \"hot\"") == 6 && count("\"name\": \"copy\"") == 6 && count("\"name\": \"cold\"") == 3 &&
              count("\"name\": \"wait\"") == 3 && count("\"tokens\": 300") == 6, "events of the trace: " + all);
    check(count("\"args\": {\"name\": \"QUEUE\"}") == 1 && count("\"args\": {\"name\": \"CPU\"}") == 2, "rows of the trace");
}

} // namespace

int main() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    std::string folder = std::filesystem::temp_directory_path() / "pinfer-test-XXXXXX";
    if (!mkdtemp(folder.data())) {
        printf("no temporary folder\n");
        return 1;
    }
    std::filesystem::current_path(folder);
    for (fake_device * fake : {&queue, &pinned, &calls, &sync_pinned}) {
        fake_register(fake);
    }
    test_two_devices();
    test_same_bits();
    test_at_the_same_time();
    test_memory();
    test_failure();
    test_refusals();
    test_trace();
    pinfer_release(files.model.c_str()); // ends the threads of the devices before they go
    std::filesystem::remove_all(folder);
    printf("hot devices: %d failures\n", failures);
    return failures != 0;
}
