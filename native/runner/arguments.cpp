// arguments.cpp: one table of options from which both the parser and --help work.
#include "arguments.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

enum kind {
    KIND_ON,      // bool, true when given
    KIND_OFF,     // bool, false when given
    KIND_TEXT,
    KIND_INT,     // int32_t
    KIND_SEED,    // int64_t
    KIND_FLOAT,
    KIND_PROMPT,  // text that also says that there is a prompt
    KIND_LAYERS,  // int32_t, or "all"
    KIND_FLASH,   // on | off | auto; alone it means on
};

struct option {
    const char * names[3];
    const char * value;   // its name in --help, NULL for a flag
    enum kind    kind;
    void *       target;
    double       min, max;
    const char * help;    // NULL: a heading with the text in names[0]
};

const double big = 2147483647.0;

std::vector<option> options_of(pinfer_arguments & a) {
    return {
        { { "Model", nullptr, nullptr }, nullptr, KIND_ON, nullptr, 0, 0, nullptr },
        { { "-m", "--model", nullptr }, "FILE", KIND_TEXT, &a.model, 0, 0, "GGUF to run" },
        { { "--artefacts", nullptr, nullptr }, "DIR", KIND_TEXT, &a.artefacts, 0, 0,
          "folder of predictor.gguf, hot.gguf and cold.gguf (default: FILE.pinfer, else under $PINFER_HOME)" },
        { { "--no-artefacts", nullptr, nullptr }, nullptr, KIND_ON, &a.no_artefacts, 0, 0, "use none of them" },
        { { "--exact", nullptr, nullptr }, nullptr, KIND_ON, &a.exact, 0, 0, "ignore the predictor: lossless" },
        { { "--dense", nullptr, nullptr }, nullptr, KIND_ON, &a.dense, 0, 0, "stock libllama, for comparison" },
        { { "--activation", nullptr, nullptr }, "NAME", KIND_TEXT, &a.activation, 0, 0,
          "relu, relu2, reglu, drelu or other, where the model does not say it" },
        { { "--device", "-dev", nullptr }, "NAME", KIND_TEXT, &a.device, 0, 0,
          "ggml device of the hot neurons (default: as solved for, else the first GPU; none: no hot part)" },
        { { "--rpc", nullptr, nullptr }, "HOST:PORT[,...]", KIND_TEXT, &a.rpc, 0, 0,
          "RPC servers whose devices are used as RPC0, RPC1, ... (default: $PINFER_RPC)" },
        { { "-ngl", "--gpu-layers", "--n-gpu-layers" }, "N", KIND_LAYERS, &a.n_gpu_layers, -1, big,
          "layers whose attention lies on the GPU, or all (default: as placed by solve, else 0)" },
        { { "--n-batch-dense", nullptr, nullptr }, "N", KIND_INT, &a.n_batch_dense, 0, big,
          "from this many tokens on a batch is computed densely (default: 0, measured)" },
        { { "--mlock", nullptr, nullptr }, nullptr, KIND_ON, &a.mlock, 0, 0, "keep the model in memory" },
        { { "--no-mmap", nullptr, nullptr }, nullptr, KIND_ON, &a.no_mmap, 0, 0,
          "read the model instead of mapping it (only with --dense)" },

        { { "Prompt and output", nullptr, nullptr }, nullptr, KIND_ON, nullptr, 0, 0, nullptr },
        { { "-p", "--prompt", nullptr }, "TEXT", KIND_PROMPT, &a.prompt, 0, 0, "prompt (none: chat)" },
        { { "-f", "--file", nullptr }, "FILE", KIND_PROMPT, &a.prompt_file, 0, 0, "prompt from a file, - is stdin" },
        { { "-n", "--predict", "--n-predict" }, "N", KIND_INT, &a.n_predict, -2, big,
          "tokens to generate (default: -1, until the model ends or the context is full)" },
        { { "-cnv", "--conversation", nullptr }, nullptr, KIND_ON, &a.conversation, 0, 0,
          "chat, with the prompt as its first message" },
        { { "-no-cnv", "--no-conversation", nullptr }, nullptr, KIND_ON, &a.no_conversation, 0, 0, "never chat" },
        { { "-sys", "--system-prompt", nullptr }, "TEXT", KIND_TEXT, &a.system_prompt, 0, 0,
          "system prompt of the chat" },
        { { "-e", "--escape", nullptr }, nullptr, KIND_ON, &a.escape, 0, 0,
          "\\n and the like in -p and -sys are escapes (default)" },
        { { "--no-escape", nullptr, nullptr }, nullptr, KIND_OFF, &a.escape, 0, 0, "they are not" },
        { { "--no-display-prompt", nullptr, nullptr }, nullptr, KIND_ON, &a.no_display_prompt, 0, 0,
          "do not repeat the prompt on stdout" },
        { { "--json", nullptr, nullptr }, nullptr, KIND_ON, &a.json, 0, 0, "one JSON object on stdout, at the end" },
        { { "-v", "--verbose", nullptr }, nullptr, KIND_ON, &a.verbose, 0, 0, "libllama's log on stderr" },
        { { "-h", "--help", nullptr }, nullptr, KIND_ON, &a.help, 0, 0, "this text" },

        { { "Context", nullptr, nullptr }, nullptr, KIND_ON, nullptr, 0, 0, nullptr },
        { { "-c", "--ctx-size", nullptr }, "N", KIND_INT, &a.n_ctx, 0, big,
          "context in tokens, 0: the model's (default: as solved for, else the model's up to 4096)" },
        { { "-b", "--batch-size", nullptr }, "N", KIND_INT, &a.n_batch, 1, big, "logical batch (default: 2048)" },
        { { "-ub", "--ubatch-size", nullptr }, "N", KIND_INT, &a.n_ubatch, 1, big, "physical batch (default: 512)" },
        { { "-t", "--threads", nullptr }, "N", KIND_INT, &a.n_threads, -1, 4096, "threads (default: the cores)" },
        { { "-tb", "--threads-batch", nullptr }, "N", KIND_INT, &a.n_threads_batch, -1, 4096,
          "threads for the prompt (default: as -t)" },
        { { "-fa", "--flash-attn", nullptr }, "on|off|auto", KIND_FLASH, &a.flash_attn, 0, 0,
          "flash attention (default: auto)" },
        { { "-ctk", "--cache-type-k", nullptr }, "TYPE", KIND_TEXT, &a.cache_type_k, 0, 0,
          "KV cache: f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl (default: f16)" },
        { { "-ctv", "--cache-type-v", nullptr }, "TYPE", KIND_TEXT, &a.cache_type_v, 0, 0, "the same for V" },

        { { "Sampling", nullptr, nullptr }, nullptr, KIND_ON, nullptr, 0, 0, nullptr },
        { { "-s", "--seed", nullptr }, "N", KIND_SEED, &a.seed, -1, 4294967295.0, "seed (default: -1, random)" },
        { { "--temp", "--temperature", nullptr }, "T", KIND_FLOAT, &a.temp, 0, 1e6, "0: greedy (default: 0.8)" },
        { { "--top-k", nullptr, nullptr }, "N", KIND_INT, &a.top_k, -1, big, "0: all (default: 40)" },
        { { "--top-p", nullptr, nullptr }, "P", KIND_FLOAT, &a.top_p, 0, 1e6, "1: off (default: 0.95)" },
        { { "--min-p", nullptr, nullptr }, "P", KIND_FLOAT, &a.min_p, 0, 1e6, "0: off (default: 0.05)" },
        { { "--repeat-penalty", nullptr, nullptr }, "X", KIND_FLOAT, &a.repeat_penalty, 1e-3, 1e6,
          "1: off (default: 1.0)" },
        { { "--repeat-last-n", nullptr, nullptr }, "N", KIND_INT, &a.repeat_last_n, -1, big,
          "tokens the penalties look at, -1: the context (default: 64)" },
        { { "--presence-penalty", nullptr, nullptr }, "X", KIND_FLOAT, &a.presence_penalty, -1e6, 1e6,
          "default: 0.0" },
        { { "--frequency-penalty", nullptr, nullptr }, "X", KIND_FLOAT, &a.frequency_penalty, -1e6, 1e6,
          "default: 0.0" },
        { { "--grammar", nullptr, nullptr }, "GBNF", KIND_TEXT, &a.grammar, 0, 0, "grammar of the output" },
        { { "--grammar-file", nullptr, nullptr }, "FILE", KIND_TEXT, &a.grammar_file, 0, 0, "grammar from a file" },
        { { "--ignore-eos", nullptr, nullptr }, nullptr, KIND_ON, &a.ignore_eos, 0, 0,
          "never sample an end-of-generation token" },
    };
}

const option * option_find(const std::vector<option> & options, const char * name) {
    for (const option & o : options) {
        for (int i = 0; o.help && i < 3 && o.names[i]; i++) {
            if (strcmp(o.names[i], name) == 0) {
                return &o;
            }
        }
    }
    return nullptr;
}

bool is_one_of(const std::string & value, const std::vector<const char *> & names) {
    for (const char * name : names) {
        if (value == name) {
            return true;
        }
    }
    return false;
}

// A number within the option's range into its target.
bool number_set(const option & o, const char * value, std::string & err) {
    char *       end    = nullptr;
    const bool   whole  = o.kind != KIND_FLOAT;
    errno               = 0;
    const double number = whole ? (double) strtoll(value, &end, 10) : strtod(value, &end);
    if (end == value || *end != '\0' || errno == ERANGE || !std::isfinite(number)) {
        err = std::string(o.names[0]) + " wants " + (whole ? "a whole number" : "a number") + ", not '" + value + "'";
        return false;
    }
    if (number < o.min || number > o.max) {
        char range[96];
        if (o.max >= 1e6) {
            snprintf(range, sizeof(range), " must be at least %g", o.min);
        } else {
            snprintf(range, sizeof(range), " must lie in %g to %g", o.min, o.max);
        }
        err = std::string(o.names[0]) + range + ", not " + value;
        return false;
    }
    switch (o.kind) {
        case KIND_FLOAT: *(float *) o.target = (float) number;     break;
        case KIND_SEED:  *(int64_t *) o.target = (int64_t) number; break;
        default:         *(int32_t *) o.target = (int32_t) number; break;
    }
    return true;
}

bool combination_check(pinfer_arguments & a, std::string & err) {
    if (a.model.empty()) {
        err = "no model; name one with -m MODEL.gguf";
    } else if (a.conversation && a.no_conversation) {
        err = "-cnv and -no-cnv exclude each other";
    } else if (a.dense && a.exact) {
        err = "--dense and --exact exclude each other";
    } else if (a.no_artefacts && !a.artefacts.empty()) {
        err = "--artefacts and --no-artefacts exclude each other";
    } else if (!a.grammar.empty() && !a.grammar_file.empty()) {
        err = "--grammar and --grammar-file exclude each other";
    } else if (a.json && (a.conversation || (!a.has_prompt && !a.no_conversation))) {
        err = "--json reports one run, not a chat; give a prompt with -p or -f";
    } else if (!a.system_prompt.empty() && !a.conversation && (a.has_prompt || a.no_conversation)) {
        err = "-sys belongs to a chat; add -cnv, or leave out -p";
    } else if (a.conversation && a.prompt_file == "-") {
        err = "-f - reads stdin, which the chat needs; use -p or a file";
    } else if (!is_one_of(a.flash_attn, { "on", "off", "auto" })) {
        err = "-fa wants on, off or auto, not '" + a.flash_attn + "'";
    }
    return err.empty();
}

} // namespace

bool pinfer_arguments_parse(int argc, char ** argv, pinfer_arguments & args, std::string & err) {
    const std::vector<option> options = options_of(args);

    for (int i = 1; i < argc; i++) {
        const option * o = option_find(options, argv[i]);
        if (!o) {
            err = std::string(argv[i][0] == '-' ? "unknown option " : "unexpected argument ") + argv[i] +
                  "; see pinfer-runner --help";
            return false;
        }
        if (o->kind == KIND_ON || o->kind == KIND_OFF) {
            *(bool *) o->target = o->kind == KIND_ON;
            continue;
        }
        if (o->kind == KIND_FLASH && (i + 1 == argc || !is_one_of(argv[i + 1], { "on", "off", "auto" }))) {
            args.flash_attn = "on";
            continue;
        }
        if (i + 1 == argc) {
            err = std::string(argv[i]) + " wants a value; see pinfer-runner --help";
            return false;
        }
        const char * value = argv[++i];
        switch (o->kind) {
            case KIND_TEXT:
            case KIND_FLASH:
                *(std::string *) o->target = value;
                break;
            case KIND_PROMPT:  // the last of -p and -f counts
                args.prompt.clear();
                args.prompt_file.clear();
                args.has_prompt            = true;
                *(std::string *) o->target = value;
                break;
            case KIND_LAYERS:
                if (strcmp(value, "all") == 0) {
                    args.n_gpu_layers = 999;
                    break;
                }
                [[fallthrough]];
            default:
                if (!number_set(*o, value, err)) {
                    return false;
                }
        }
    }
    return args.help || combination_check(args, err);
}

std::string pinfer_arguments_help(void) {
    pinfer_arguments args;
    std::string      text =
        "usage: pinfer-runner -m MODEL.gguf [-p TEXT] [options]\n\n"
        "Runs a GGUF with libllama; the FFN of a ReLU-family model is computed sparsely by pinfer. The text goes to\n"
        "stdout, everything else to stderr. Exit code: 0, 1 on errors, 2 on wrong usage, 130 after Ctrl-C.\n";
    for (const option & o : options_of(args)) {
        if (!o.help) {
            text += std::string("\n") + o.names[0] + "\n";
            continue;
        }
        std::string left = "  ";
        for (int i = 0; i < 3 && o.names[i]; i++) {
            left += (i ? ", " : "") + std::string(o.names[i]);
        }
        if (o.value) {
            left += std::string(" ") + o.value;
        }
        left.resize(left.size() < 40 ? 40 : left.size() + 2, ' ');
        text += left + o.help + "\n";
    }
    return text;
}
