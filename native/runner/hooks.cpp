// hooks.cpp: the runner's part in llama.cpp's programs.
#include "hooks.h"

#include "leave.h"
#include "plugin_setup.h"
#include "report.h"
#include "speculative.h"
#include "run.h"
#include "server-http.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstring>
#include <mutex>
#include <thread>
#include <unistd.h>

namespace {

pinfer_run * run = nullptr;

std::string formatted(const char * format, va_list args) {
    char *    buffer = nullptr;
    const int n      = vasprintf(&buffer, format, args);
    const std::string text(buffer, n > 0 ? (size_t) n : 0);
    free(buffer);
    return text;
}

// `text`: what printf would have made of the variable arguments.
#define PINFER_FORMATTED(text, format)          \
    va_list args;                               \
    va_start(args, format);                     \
    std::string text = formatted(format, args); \
    va_end(args)

// "llama_model_load: error loading model: x" -> "error loading model: x"
std::string without_function_name(const std::string & line) {
    const size_t end = line.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_ ");
    return end != std::string::npos && end > 0 && line.compare(end, 2, ": ") == 0 && line.find(' ') >= end
               ? line.substr(end + 2)
               : line;
}

void error_keep(std::string text) {
    static std::mutex mutex;  // the log may come from threads of a backend
    const std::lock_guard<std::mutex> guard(mutex);
    while (!text.empty() && isspace((unsigned char) text.back())) {
        text.pop_back();
    }
    if (run->error.empty()) {
        run->error = without_function_name(text);
    }
}

void on_log(enum ggml_log_level level, const char * text, void * user_data) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        error_keep(text);
    }
    common_log_default_callback(level, text, user_data);
}

// All of the text to stdout; a reader that has gone ends the process quietly.
void stdout_write(const std::string & text) {
    if (fwrite(text.data(), 1, text.size(), stdout) == text.size() && fflush(stdout) == 0) {
        return;
    }
    if (errno == EPIPE) {
        pinfer_leave(PINFER_EXIT_CLOSED_PIPE);
    }
    pinfer_say_error(std::string("cannot write to stdout: ") + strerror(errno));
    pinfer_leave(PINFER_EXIT_ERROR);
}

// --- signals ----------------------------------------------------------------------------------------------------------

void (*program_handler)(int) = nullptr;
int              wake_pipe[2] = { -1, -1 };
std::atomic<int> pending{ 0 };

void on_signal(int sig) {
    if (pending.exchange(sig) != 0) {
        pinfer_leave(128 + sig);  // asked twice
    }
    const ssize_t ignored = write(wake_pipe[1], "", 1);
    (void) ignored;
}

// Waits for the signal. A server's handler takes locks, so it runs here; a completion looks at `pending` after each token.
// A chat has nothing to wait for.
void signal_thread(void) {
    char          byte;
    const ssize_t ignored = read(wake_pipe[0], &byte, 1);
    (void) ignored;
    const bool server     = run->options.verb == "server";
    const bool completion = run->options.verb == "completion";
    if (server) {
        program_handler(pending.load());
    }
    sleep(server ? 3 : completion ? 2 : 0);
    if (!completion) {
        pinfer_run_end(*run, nullptr);
    }
    pinfer_leave(server ? 0 : 128 + pending.load());
}

} // namespace

void pinfer_hooks_start(pinfer_run & current) {
    run = &current;
    llama_log_set([](enum ggml_log_level, const char *, void *) {}, nullptr);  // until llama.cpp's own is set up
}

bool pinfer_params_parse(int argc, char ** argv, common_params & params, llama_example ex, void (*print_usage)(int, char **)) {
    const bool completion = ex == LLAMA_EXAMPLE_COMPLETION;
    params.verbosity      = completion ? LOG_LEVEL_OUTPUT : params.verbosity;
    params.warmup         = params.warmup && !completion;  // a run that ends soon would only start later
    params.n_outputs_max  = completion ? 1 : params.n_outputs_max;  // it looks at the last token's logits alone
    if (!common_params_parse(argc, argv, params, ex, print_usage)) {
        exit(PINFER_EXIT_USAGE);
    }
    run->answer.model = params.model.path;
    run->interactive  = !completion || params.interactive || params.interactive_first;
    run->verbose      = params.verbosity > LOG_LEVEL_ERROR;
    params.simple_io  = params.simple_io || !run->interactive || !isatty(STDOUT_FILENO);  // the terminal stays as it is
    params.display_prompt = params.display_prompt || run->options.json;
    // llama.cpp loads a draft model and lets it idle unless --spec-type is given, or the draft's file says what it is for.
    auto & speculative = params.speculative;
    if (speculative.types == std::vector{ COMMON_SPECULATIVE_TYPE_NONE } && !speculative.draft.mparams.path.empty() &&
        common_speculative_types_from_gguf(speculative.draft.mparams.path).empty()) {
        speculative.types = { COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE };
    }
    if (run->options.models.empty()) {
        return true;
    }
    // The FFN is computed where the file is mapped, whole experts where llama.cpp has put them.
    const bool mapped = run->options.models[0].activation != PINFER_ACT_OTHER;
    if (mapped && params.load_mode == LLAMA_LOAD_MODE_AUTO) {
        params.load_mode = LLAMA_LOAD_MODE_MMAP;
    } else if (mapped && params.load_mode != LLAMA_LOAD_MODE_MMAP && params.load_mode != LLAMA_LOAD_MODE_MMAP_MLOCK) {
        pinfer_say_error("pinfer computes the FFN where the model is mapped: use --load-mode mmap or mmap+mlock, or --dense");
        exit(PINFER_EXIT_USAGE);
    }
    for (const pinfer_model_options & model : run->options.models) {
        char cause[512];
        if (params.load_mode == LLAMA_LOAD_MODE_MMAP_MLOCK && !pinfer_lock(model.path.c_str(), cause, sizeof(cause))) {
            pinfer_say_note(std::string(cause) + "; ulimit -l says how much may be locked");
        }
    }
    params.no_op_offload = true;  // copies of CPU layers' weights on a device are in no budget
    params.fit_params    = false; // the placement is the one that was decided
    // The loader puts FFNs where the plugin computes them. What the user placed with -ot comes first.
    const auto add = [](std::vector<llama_model_tensor_buft_override> & overrides, const pinfer_model_options & model) {
        size_t n = 0;
        while (n < overrides.size() && overrides[n].pattern) {
            n++;
        }
        overrides.insert(overrides.begin() + (ptrdiff_t) n, pinfer_plugin_override(model));
        if (n + 1 == overrides.size()) {
            overrides.push_back({ nullptr, nullptr });
        }
    };
    add(params.tensor_buft_overrides, run->options.models[0]);
    if (run->options.models.size() > 1) {
        add(params.speculative.draft.tensor_buft_overrides, run->options.models[1]);
    }
    // The dense layers lie on the devices that were named; beside hot neurons, on one device.
    const pinfer_model_options & model = run->options.models[0];
    if (params.devices.empty() && !(model.hot.empty() && model.devices.empty())) {
        for (size_t i = 0; i < ggml_backend_dev_count() && (model.hot.empty() || params.devices.empty()); i++) {
            ggml_backend_dev_t               dev   = ggml_backend_dev_get(i);
            const enum ggml_backend_dev_type type  = ggml_backend_dev_type(dev);
            const bool                       named = std::count(model.devices.begin(), model.devices.end(), ggml_backend_dev_name(dev)) > 0;
            if ((type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) && (named || model.devices.empty())) {
                params.devices.push_back(dev);
            }
        }
        params.devices.push_back(nullptr);
    }
    return true;
}

void pinfer_flags_print(void) {
    const std::pair<const char *, llama_example> programs[] = {
        { "completion", LLAMA_EXAMPLE_COMPLETION }, { "cli", LLAMA_EXAMPLE_CLI }, { "server", LLAMA_EXAMPLE_SERVER }
    };
    for (const auto & [verb, example] : programs) {
        common_params params;
        for (const common_arg & flag : common_params_parser_init(params, example).options) {
            for (const auto * names : { &flag.args, &flag.args_neg }) {
                for (const char * name : *names) {
                    printf("%s\t%s\t%d\t%s\n", verb, name, flag.value_hint_2 ? 2 : flag.value_hint ? 1 : 0, flag.env ? flag.env : "");
                }
            }
        }
    }
}

void pinfer_common_init(void) {
    common_init();
    llama_log_set(on_log, nullptr);
}

int pinfer_signal_handler_set(int sig, const struct sigaction * action) {
    // A chat's own handler stops the answer and lets the chat go on: that is for Ctrl-C, not for SIGTERM.
    if (run->options.verb == "cli" && sig != SIGTERM) {
        return sigaction(sig, action, nullptr);
    }
    if (wake_pipe[0] < 0) {
        if (pipe(wake_pipe) != 0) {
            return sigaction(sig, action, nullptr);
        }
        std::thread(signal_thread).detach();
    }
    program_handler          = action->sa_handler;
    struct sigaction ours    = *action;
    ours.sa_handler          = on_signal;
    ours.sa_flags            = SA_RESTART;
    return sigaction(sig, &ours, nullptr);
}

// --- llama_completion -------------------------------------------------------------------------------------------------

void pinfer_completion_accept(common_sampler * sampler, llama_token token, bool generated) {
    if (pending.load() != 0) {
        program_handler(pending.load());  // reports, and ends the process
    }
    run->generating = run->generating || generated;
    (run->generating ? run->answer.tokens : run->answer.prompt_tokens).push_back(token);
    common_sampler_accept(sampler, token, generated);
}

void pinfer_completion_print(const char * format, ...) {
    PINFER_FORMATTED(text, format);
    // Only tokens come as "%s". The rest is for a terminal: "[end of text]", line breaks, "Interrupted by user".
    const bool token = strcmp(format, "%s") == 0;
    if (!token && !run->interactive) {
        return;
    }
    (run->generating ? run->answer.text : run->answer.prompt) += text;
    if (!run->options.json) {
        stdout_write(text);
    }
}

void pinfer_completion_error(const char * format, ...) {
    PINFER_FORMATTED(text, format);
    error_keep(text);
}

void pinfer_completion_warn(const char * format, ...) {
    PINFER_FORMATTED(text, format);
    if (text.find("context full") != std::string::npos) {
        run->answer.context_full = true;
        text = "the context is full; -c makes it larger";
    }
    text.erase(text.find_last_not_of(" \n") + 1);
    pinfer_say_note(without_function_name(text));
}

void pinfer_completion_end(const llama_context * ctx, const common_sampler * sampler) {
    run->answer.seed        = common_sampler_get_seed(sampler);
    const std::string shown = run->answer.prompt + run->answer.text;
    if (run->options.json) {
        stdout_write(pinfer_report_json(ctx, run->answer));
    } else if (!shown.empty() && shown.back() != '\n') {
        stdout_write("\n");
    }
    pinfer_run_end(*run, ctx);
    if (pending.load() != 0) {
        pinfer_leave(PINFER_EXIT_INTERRUPTED);
    }
    if (run->verbose) {
        common_perf_print(ctx, sampler);
    }
}

// --- llama_server -----------------------------------------------------------------------------------------------------

server_http_res_ptr pinfer_server_status(const server_http_req &) {
    auto response  = std::make_unique<server_http_res>();
    response->data = pinfer_report_models();
    return response;
}

// --- llama_cli --------------------------------------------------------------------------------------------------------

void console::pinfer_log(const char * format, ...) {
    PINFER_FORMATTED(text, format);
    // The answer comes as "%s", and "\n" ends it. Messages, and the prompt signs between turns, are for a terminal.
    if (isatty(STDOUT_FILENO) || strcmp(format, "%s") == 0 || strcmp(format, "\n") == 0) {
        console::log("%s", text.c_str());
    } else if (run->verbose) {
        fputs(text.c_str(), stderr);
    }
}
