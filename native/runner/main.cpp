// main.cpp: pinfer-runner: one of llama.cpp's own programs, with pinfer's plugin configured as the command line says.
#include "common.h"
#include "leave.h"
#include "pinfer.h"
#include "plugin_setup.h"
#include "run.h"
#include "ui.h"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <unistd.h>

int llama_completion(int argc, char ** argv);
int llama_cli(int argc, char ** argv);
int llama_server(int argc, char ** argv);

namespace {

pinfer_run run;

// A router starts `pinfer-runner server ...` for each of its models; what is to be used of that model is for the caller to
// decide, whose command, a word a line, is in this variable.
const char router_variable[] = "PINFER_ROUTER_COMMAND";

void router_child_become(const std::string & command) {
    std::vector<std::string> words = string_split<std::string>(command, '\n');
    std::vector<char *>      argv;
    for (std::string & word : words) {
        argv.push_back(word.data());
    }
    argv.insert(argv.end(), run.options.rest.begin() + 1, run.options.rest.end());
    unsetenv(router_variable);
    execv(argv[0], argv.data());
}

int program_run(void) {
    const int     argc = (int) run.options.rest.size() - 1;
    char ** const argv = run.options.rest.data();
    if (run.options.verb == "completion") {
        return llama_completion(argc, argv);
    }
    if (run.options.verb == "cli") {
        return llama_cli(argc, argv);
    }
#ifndef LLAMA_UI_HAS_ASSETS
    if (!getenv("LLAMA_SERVER_ROUTER_PORT") && strcmp(argv[1], "--help") != 0) {
        pinfer_say_note("this build has no web page, only the API; `make web-ui` adds the page (needs npm)");
    }
#endif
    setenv("LLAMA_APP_CMD", "server", 1);  // a router starts its models as `pinfer-runner server ...`
    return llama_server(argc, argv);
}

// Why the program failed.
std::string failure(void) {
    char cause[512] = "";
    if (!run.options.models.empty() && pinfer_last_failure(nullptr, cause, sizeof(cause))) {
        const bool device = std::string(cause).compare(0, 6, "device") == 0;
        return std::string(cause) + (device ? "; check the device, or do without it: --hot-device none" : "");
    }
    const std::string what = run.error.empty() ? "llama.cpp failed" : run.error;
    if (what.find("prompt is too long") != std::string::npos) {
        return what + "; -c makes the context larger";
    }
    return (run.answer.model.empty() ? "" : run.answer.model + ": ") + what + "; -v shows llama.cpp's log";
}

} // namespace

void pinfer_run_end(pinfer_run & current, const llama_context * ctx) {
    static std::atomic<bool> done{ false };
    if (done.exchange(true)) {
        return;
    }
    const std::string line     = pinfer_report_line(ctx);
    const std::string fallback = current.options.models.empty() ? "" : pinfer_report_fallback();
    if (!line.empty()) {
        fflush(stdout);
        fprintf(stderr, "%s\n", line.c_str());
    }
    if (!fallback.empty()) {
        pinfer_say_note(fallback);
    }
}

int main(int argc, char ** argv) {
    std::string err;
    if (!pinfer_options_parse(argc, argv, run.options, err)) {
        pinfer_say_error(err);
        return PINFER_EXIT_USAGE;
    }
    if (run.options.verb == "flags") {
        pinfer_flags_print();
        return 0;
    }
    const char * command = getenv(router_variable);
    if (command && getenv("LLAMA_SERVER_ROUTER_PORT")) {
        router_child_become(command);
        pinfer_say_error(std::string("cannot start ") + command);
        return PINFER_EXIT_ERROR;
    }
    pinfer_catch_crashes(run.options.models.empty() ? "the model" : run.options.models[0].path);
    signal(SIGPIPE, SIG_IGN);  // a closed stdout is an error of write(), dealt with there
    pinfer_hooks_start(run);
    if (!pinfer_plugin_setup(run.options, err)) {
        pinfer_say_error(err);
        return PINFER_EXIT_ERROR;
    }
    pinfer_report_start(run.options);
    int code = 1;
    try {
        code = program_run();
    } catch (const std::exception & e) {
        run.error = run.error.empty() ? e.what() : run.error;
    }
    if (code == 0) {
        pinfer_run_end(run, nullptr);
        return 0;
    }
    pinfer_say_error(failure());
    return PINFER_EXIT_ERROR;
}
