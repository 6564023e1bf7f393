// report.h: what a run was like: the closing line on stderr, and --pinfer-json.
#pragma once

#include "llama.h"
#include "options.h"

#include <string>
#include <vector>

// A completion, as far as it came.
struct pinfer_answer {
    std::string              model, prompt, text;
    std::vector<llama_token> prompt_tokens, tokens;
    uint32_t                 seed = 0;
    bool                     context_full = false;
};

// Notes the free memory of the devices, before anything is loaded.
void pinfer_report_start(const pinfer_options & options);

// The closing line, without the parts that do not apply; empty when none does. Without a context there are no rates.
// [ Prompt: 231.0 t/s | Generation: 31.2 t/s | active 9.8 % | computed 31 % | on GPU 71 % | VRAM 7.9/8.0 GiB ]
std::string pinfer_report_line(const llama_context * ctx);

// One line to say when parts of the graph had to be computed by the plain CPU backend; empty when none had.
std::string pinfer_report_fallback(void);

// One JSON object and a line break.
std::string pinfer_report_json(const llama_context * ctx, const pinfer_answer & answer);

// The same about the models that the plugin computes, and what it has computed of them so far.
std::string pinfer_report_models(void);
