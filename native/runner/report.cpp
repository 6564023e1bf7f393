// report.cpp: rates from libllama's counters, shares from the plugin's, memory from both and from the devices.
#include "report.h"

#include "common.h"
#include "json.h"
#include "pinfer.h"
#include "src/llama-ext.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

const double gib = 1024.0 * 1024.0 * 1024.0;

struct device {
    ggml_backend_dev_t dev;
    size_t             free_first;  // bytes
    bool               reports_its_own;  // free memory is the device's; what lies behind RPC may be a CPU
};

const pinfer_options * options = nullptr;
std::vector<device>    devices;

double rate(int32_t n, double ms) {
    return n > 0 && ms > 0.0 ? 1e3 * n / ms : NAN;
}

double share(uint64_t part, uint64_t whole) {
    return whole > 0 ? (double) part / (double) whole : NAN;
}

// Which of a device's neurons fire is not known on the CPU, so activity is that of the neurons computed here.
struct shares {
    double   active = NAN, candidates = NAN;  // of the CPU's neurons: those that fired; those whose first product was computed
    double   computed = NAN, hot = NAN;       // of all neurons: those computed at all; those on devices
    double   on_device = NAN;                 // of the neurons computed, those on devices
    uint64_t n_tokens = 0, hot_bytes = 0, n_fallback = 0;
};

// Of a model; NULL: of all together.
shares shares_get(const pinfer_model_options * model = nullptr) {
    shares s;
    if (options->models.empty()) {
        return s;
    }
    struct pinfer_stats stats = {};
    pinfer_get_stats(model ? model->path.c_str() : nullptr, &stats);
    const pinfer_model_options & described = model ? *model : options->models[0];
    if (described.activation != PINFER_ACT_OTHER) {  // nothing is zero in experts of other kinds
        s.active = share(stats.n_active, stats.n_neurons - stats.n_hot);
    }
    s.candidates = share(stats.n_candidates, stats.n_neurons - stats.n_hot);
    s.computed   = share(stats.n_candidates + stats.n_hot, stats.n_neurons);
    if (!described.hot.empty()) {
        s.hot       = share(stats.n_hot, stats.n_neurons);
        s.on_device = share(stats.n_hot, stats.n_hot + stats.n_candidates);
    }
    s.n_tokens   = stats.n_tokens;
    s.hot_bytes  = stats.hot_bytes;
    s.n_fallback = stats.n_fallback;
    return s;
}

struct vram {
    uint64_t used = 0, counted = 0, limit = 0;  // bytes; counted: in buffers of libllama and hot shards
};

// Memory this process has taken of the devices it uses; used is 0 where it uses none.
vram vram_get(const llama_context * ctx) {
    vram v;
    if (!ctx) {
        return v;
    }
    const auto breakdown = llama_get_memory_breakdown(ctx);
    for (const device & d : devices) {
        uint64_t counted = 0;
        for (const auto & [type, data] : breakdown) {
            if (ggml_backend_buft_get_device(type) == d.dev && !ggml_backend_buft_is_host(type)) {
                counted += data.model + data.context + data.compute;
            }
        }
        for (const pinfer_model_options & model : options->models) {
            for (size_t i = 0; i < model.devices.size(); i++) {
                if (model.devices[i] == ggml_backend_dev_name(d.dev)) {
                    counted += pinfer_hot_shard_bytes(model.path.c_str(), (int32_t) i);
                }
            }
        }
        if (counted == 0) {
            continue;
        }
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(d.dev, &free, &total);
        v.used += std::max<uint64_t>(d.reports_its_own && d.free_first > free ? d.free_first - free : 0, counted);
        v.counted += counted;
        v.limit += total;
    }
    if (options->vram > 0) {
        v.limit = options->vram;
    }
    return v;
}

const char * mode_name(const pinfer_model_options & model) {
    return model.predictor.empty() ? "exact" : "predicted";
}

const char * mode_name(void) {
    return options->models.empty() ? "dense" : mode_name(options->models[0]);
}

common_json_value number(double value) {
    return std::isfinite(value) ? common_json_value(value) : common_json_value(nullptr);
}

} // namespace

void pinfer_report_start(const pinfer_options & chosen) {
    options = &chosen;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t               dev  = ggml_backend_dev_get(i);
        const enum ggml_backend_dev_type type = ggml_backend_dev_type(dev);
        const bool gpu = type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
        bool       hot = false;
        for (const pinfer_model_options & model : chosen.models) {
            hot = hot || std::count(model.devices.begin(), model.devices.end(), ggml_backend_dev_name(dev)) > 0;
        }
        if (gpu || hot) {
            size_t     free = 0, total = 0;
            const bool rpc  = strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0;
            ggml_backend_dev_memory(dev, &free, &total);
            devices.push_back({ dev, free, gpu && !rpc });
        }
    }
}

std::string pinfer_report_line(const llama_context * ctx) {
    const shares s    = shares_get();
    std::string  line = "[";
    const auto   add  = [&line](const std::string & part) { line += (line.size() > 1 ? " | " : " ") + part; };

    if (ctx) {
        const llama_perf_context_data perf      = llama_perf_context(ctx);
        const double                  prompt    = rate(perf.n_p_eval, perf.t_p_eval_ms);
        const double                  generated = rate(perf.n_eval, perf.t_eval_ms);
        if (std::isfinite(prompt)) {
            add(string_format("Prompt: %.1f t/s", prompt));
        }
        if (std::isfinite(generated)) {
            add(string_format("Generation: %.1f t/s", generated));
        }
    }
    if (std::isfinite(s.active)) {
        add(string_format("active %.1f %%", 100.0 * s.active));
    }
    if (std::isfinite(s.computed) && strcmp(mode_name(), "predicted") == 0) {
        add(string_format("computed %.0f %%", 100.0 * s.computed));
    }
    if (std::isfinite(s.on_device)) {
        add(string_format("on GPU %.0f %%", 100.0 * s.on_device));
    }
    const vram v = vram_get(ctx);
    if (v.used > 0) {
        add(string_format("VRAM %.1f/%.1f GiB", (double) v.used / gib, (double) v.limit / gib));
    }
    return line.size() > 1 ? line + " ]" : "";
}

std::string pinfer_report_fallback(void) {
    const uint64_t n = shares_get().n_fallback;
    return n == 0 ? "" : std::to_string(n) + " graph nodes matched nothing that pinfer knows; the CPU backend computed them "
                         "densely";
}

std::string pinfer_report_json(const llama_context * ctx, const pinfer_answer & answer) {
    const shares                  s      = shares_get();
    const bool                    sparse = !options->models.empty();
    const llama_perf_context_data perf   = llama_perf_context(ctx);
    const vram                    v      = vram_get(ctx);
    const llama_model *           model  = llama_get_model(ctx);
    const llama_vocab *           vocab  = llama_model_get_vocab(model);
    const bool                    eog    = !answer.tokens.empty() && llama_vocab_is_eog(vocab, answer.tokens.back());
    const std::vector<int32_t>    tokens(answer.tokens.begin(), answer.tokens.end() - (eog ? 1 : 0));

    const auto bytes  = [](bool known, uint64_t n) { return known ? common_json_value(n) : common_json_value(nullptr); };
    char arch[64] = "";
    llama_model_meta_val_str(model, "general.architecture", arch, sizeof(arch));

    common_json json = {
        { "model", answer.model },
        { "arch", arch },
        { "mode", mode_name() },
        { "isa", sparse ? common_json_value(pinfer_isa()) : common_json_value(nullptr) },
        { "prompt", answer.prompt },
        { "text", answer.text },
        { "prompt_tokens", answer.prompt_tokens },
        { "tokens", tokens },
        { "n_prompt", (uint64_t) answer.prompt_tokens.size() },
        { "n_gen", (uint64_t) tokens.size() },
        { "stop", eog ? "eog" : answer.context_full ? "context" : "length" },
        { "seed", (uint64_t) answer.seed },
        { "n_ctx", (uint64_t) llama_n_ctx(ctx) },
        { "n_threads", (int64_t) llama_n_threads(const_cast<llama_context *>(ctx)) },
        { "prompt_tps", number(rate(perf.n_p_eval, perf.t_p_eval_ms)) },
        { "gen_tps", number(rate(perf.n_eval, perf.t_eval_ms)) },
        { "active", number(s.active) },
        { "candidates", number(s.candidates) },
        { "computed", number(s.computed) },
        { "hot", number(s.hot) },
        { "on_device", number(s.on_device) },
        { "hot_bytes", bytes(sparse, s.hot_bytes) },
        { "vram_used", bytes(v.used > 0, v.used) },
        { "vram_used_counted", bytes(v.used > 0, v.counted) },
        { "vram_limit", bytes(v.used > 0, v.limit) },
        { "n_fallback", bytes(sparse, s.n_fallback) },
    };
    return json.dump_safe() + "\n";
}

std::string pinfer_report_models(void) {
    common_json models = common_json::array();
    for (const pinfer_model_options & model : options->models) {
        const shares s = shares_get(&model);
        models.push_back({
            { "model", model.path },
            { "mode", mode_name(model) },
            { "activation", pinfer_activation_name(model.activation) },
            { "isa", pinfer_isa() },
            { "devices", model.hot.empty() ? std::vector<std::string>() : model.devices },
            { "tokens", s.n_tokens },
            { "active", number(s.active) },
            { "candidates", number(s.candidates) },
            { "computed", number(s.computed) },
            { "hot", number(s.hot) },
            { "on_device", number(s.on_device) },
            { "hot_bytes", s.hot_bytes },
            { "n_fallback", s.n_fallback },
        });
    }
    common_json json = { { "models", models } };
    return json.dump_safe() + "\n";
}
