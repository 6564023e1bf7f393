// report.h: what a run was like: the closing line on stderr, and --json.
#pragma once

#include "generate.h"
#include "session.h"

#include <string>

// The closing line, without the parts that do not apply:
// [ Prompt: 231.0 t/s | Generation: 31.2 t/s | active 9.8 % | computed 31 % | on GPU 71 % | VRAM 7.9/8.0 GiB ]
// `show_seed` adds the seed, for runs that drew it at random.
std::string pinfer_report_line(const pinfer_session & session, bool show_seed, uint32_t seed);

// One line to say when parts of the graph had to be computed by the plain CPU backend; empty if none had.
std::string pinfer_report_fallback(const pinfer_session & session);

// One JSON object and a line break.
std::string pinfer_report_json(const pinfer_session & session, const std::string & prompt,
                               const std::vector<llama_token> & prompt_tokens, const pinfer_answer & answer,
                               uint32_t seed);
