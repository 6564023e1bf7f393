// report.cpp: rates from the session's own clocks, shares from the plugin's counters.
#include "report.h"

#include "pinfer.h"

#include <cmath>
#include <cstdio>

namespace {

const double gib = 1024.0 * 1024.0 * 1024.0;

double rate(uint64_t n, double seconds) {
    return n > 0 && seconds > 0.0 ? (double) n / seconds : NAN;
}

double share(uint64_t part, uint64_t whole) {
    return whole > 0 ? (double) part / (double) whole : NAN;
}

// Which of the device's neurons fire is not known on the CPU, so activity is that of the neurons computed here.
struct shares {
    double   active     = NAN;  // of the CPU's neurons, those that fired
    double   candidates = NAN;  // of the CPU's neurons, those whose first product was computed
    double   computed   = NAN;  // of all neurons, those computed at all
    double   hot        = NAN;  // of all neurons, those on the device
    double   on_device  = NAN;  // of the neurons computed, those on the device
    uint64_t hot_bytes  = 0;
    uint64_t n_fallback = 0;
};

shares shares_get(const pinfer_session & session) {
    shares s;
    if (session.mode == PINFER_MODE_DENSE) {
        return s;
    }
    struct pinfer_stats stats = {};
    pinfer_get_stats(&stats);
    s.active     = share(stats.n_active, stats.n_neurons - stats.n_hot);
    s.candidates = share(stats.n_candidates, stats.n_neurons - stats.n_hot);
    s.computed   = share(stats.n_candidates + stats.n_hot, stats.n_neurons);
    if (!session.artefacts.hot.empty()) {
        s.hot       = share(stats.n_hot, stats.n_neurons);
        s.on_device = share(stats.n_hot, stats.n_hot + stats.n_candidates);
    }
    s.hot_bytes  = stats.hot_bytes;
    s.n_fallback = stats.n_fallback;
    return s;
}

std::string formatted(const char * format, double a, double b = 0.0) {
    char text[128];
    snprintf(text, sizeof(text), format, a, b);
    return text;
}

std::string json_number(double value, const char * format = "%.6g") {
    return std::isfinite(value) ? formatted(format, value) : "null";
}

std::string json_tokens(const std::vector<llama_token> & tokens) {
    std::string out = "[";
    for (size_t i = 0; i < tokens.size(); i++) {
        out += (i ? ", " : "") + std::to_string(tokens[i]);
    }
    return out + "]";
}

const char * mode_name(enum pinfer_mode mode) {
    switch (mode) {
        case PINFER_MODE_DENSE:     return "dense";
        case PINFER_MODE_EXACT:     return "exact";
        case PINFER_MODE_PREDICTED: return "predicted";
    }
    return "dense";
}

} // namespace

std::string pinfer_report_line(const pinfer_session & session, bool show_seed, uint32_t seed) {
    const shares s    = shares_get(session);
    std::string  line = "[";
    const auto   add  = [&line](const std::string & part) { line += (line.size() > 1 ? " | " : " ") + part; };

    const double prompt    = rate(session.n_prompt, session.t_prompt);
    const double generated = rate(session.n_generated, session.t_generated);
    if (std::isfinite(prompt)) {
        add(formatted("Prompt: %.1f t/s", prompt));
    }
    if (std::isfinite(generated)) {
        add(formatted("Generation: %.1f t/s", generated));
    }
    if (std::isfinite(s.active)) {
        add(formatted("active %.1f %%", 100.0 * s.active));
    }
    if (session.mode == PINFER_MODE_PREDICTED && std::isfinite(s.computed)) {
        add(formatted("computed %.0f %%", 100.0 * s.computed));
    }
    if (std::isfinite(s.on_device)) {
        add(formatted("on GPU %.0f %%", 100.0 * s.on_device));
    }
    pinfer_vram vram;
    if (pinfer_session_vram(session, vram)) {
        add(formatted("VRAM %.1f/%.1f GiB", (double) vram.used / gib, (double) vram.limit / gib));
    }
    if (show_seed) {
        add("seed " + std::to_string(seed));
    }
    return line.size() > 1 ? line + " ]" : "";
}

std::string pinfer_report_fallback(const pinfer_session & session) {
    const uint64_t n = shares_get(session).n_fallback;
    return n == 0 ? "" : std::to_string(n) + " graph nodes were computed by the CPU backend, densely, because nothing "
                         "pinfer knows matched them";
}

std::string pinfer_report_json(const pinfer_session & session, const std::string & prompt,
                               const std::vector<llama_token> & prompt_tokens, const pinfer_answer & answer,
                               uint32_t seed) {
    const shares s      = shares_get(session);
    const bool   sparse = session.mode != PINFER_MODE_DENSE;
    pinfer_vram  taken;
    const bool   vram   = pinfer_session_vram(session, taken);
    const auto   bytes  = [](bool known, uint64_t n) { return known ? std::to_string(n) : std::string("null"); };

    std::string out = "{";
    const auto  add = [&out](const char * key, const std::string & value) {
        out += (out.size() > 1 ? ", \"" : "\"") + std::string(key) + "\": " + value;
    };
    add("model", pinfer_json_string(session.file.path));
    add("arch", pinfer_json_string(session.file.arch));
    add("mode", pinfer_json_string(mode_name(session.mode)));
    add("isa", sparse ? pinfer_json_string(pinfer_isa()) : "null");
    add("prompt", pinfer_json_string(prompt));
    add("text", pinfer_json_string(answer.text));
    add("prompt_tokens", json_tokens(prompt_tokens));
    add("tokens", json_tokens(answer.tokens));
    add("n_prompt", std::to_string(prompt_tokens.size()));
    add("n_gen", std::to_string(answer.tokens.size()));
    add("stop", pinfer_json_string(pinfer_stop_name(answer.stop)));
    add("seed", std::to_string(seed));
    add("n_ctx", std::to_string(session.n_ctx));
    add("n_threads", std::to_string(llama_n_threads(session.context)));
    add("prompt_tps", json_number(rate(session.n_prompt, session.t_prompt)));
    add("gen_tps", json_number(rate(session.n_generated, session.t_generated)));
    add("active", json_number(s.active));
    add("candidates", json_number(s.candidates));
    add("computed", json_number(s.computed));
    add("hot", json_number(s.hot));
    add("on_device", json_number(s.on_device));
    add("hot_bytes", bytes(sparse, s.hot_bytes));
    add("vram_loaded", bytes(vram, session.vram_loaded.used));
    add("vram_used", bytes(vram, taken.used));
    add("vram_used_counted", bytes(vram, taken.counted));
    add("vram_limit", bytes(vram, taken.limit));
    add("n_fallback", bytes(sparse, s.n_fallback));
    return out + "}\n";
}
