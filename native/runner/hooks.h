// hooks.h: where the runner takes part in llama.cpp's own programs. The compiler is told to include this file first in
// completion.cpp, cli.cpp, cli-context.cpp and server.cpp (cmake/Frontends.cmake), where the macros below replace a few
// calls. Those files stay as they are, and nothing else of llama.cpp sees the macros.
#pragma once

#include "arg.h"
#include "common.h"
#include "console.h"
#include "log.h"
#include "sampling.h"

#include <signal.h>

// Before the command line is read: the runner's defaults. Afterwards: the plugin's buffers. Wrong usage ends the process
// with exit code 2.
bool pinfer_params_parse(int argc, char ** argv, common_params & params, llama_example ex,
                         void (*print_usage)(int, char **) = nullptr);

// llama.cpp's log, of which the first error line is kept for the runner's own message.
void pinfer_common_init(void);

// Installs the program's handler for Ctrl-C or SIGTERM so that it runs outside of the signal, and within seconds.
int pinfer_signal_handler_set(int sig, const struct sigaction * action);

// llama_completion: a token of the prompt or the answer; text for stdout; an error; a warning; the end.
void pinfer_completion_accept(common_sampler * sampler, llama_token token, bool generated);
void pinfer_completion_end(const llama_context * ctx, const common_sampler * sampler);
LOG_ATTRIBUTE_FORMAT(1, 2) void pinfer_completion_print(const char * format, ...);
LOG_ATTRIBUTE_FORMAT(1, 2) void pinfer_completion_error(const char * format, ...);
LOG_ATTRIBUTE_FORMAT(1, 2) void pinfer_completion_warn(const char * format, ...);

// llama_cli: what it shows. Where stdout is no terminal, only the answers go there.
namespace console {
LOG_ATTRIBUTE_FORMAT(1, 2) void pinfer_log(const char * format, ...);
}

#if defined(PINFER_HOOKS_COMPLETION)
#    undef LOG
#    undef LOG_ERR
#    undef LOG_WRN
#    define LOG                   pinfer_completion_print
#    define LOG_ERR               pinfer_completion_error
#    define LOG_WRN               pinfer_completion_warn
#    define common_sampler_accept pinfer_completion_accept
#    define common_perf_print     pinfer_completion_end
#endif
#if defined(PINFER_HOOKS_SERVER)
#    include "server-http.h"
// llama_server: the last call of those that add its routes adds GET /pinfer; a router asks the model's own server.
server_http_res_ptr pinfer_server_status(const server_http_req & request);
#    define register_gcp_compat()                                                                                  \
        get("/pinfer", ex_wrapper(is_router_server ? models_routes->proxy_get                                      \
                                                   : server_http_context::handler_t(pinfer_server_status)));       \
        ctx_http.register_gcp_compat()
#endif
#if defined(PINFER_HOOKS_CHAT)
#    include "cli-context.h"

#    include <algorithm>
#    include <filesystem>
#    include <map>
#    include <set>
#    define log(...) pinfer_log(__VA_ARGS__)
#elif defined(PINFER_HOOKS)
#    define common_params_parse             pinfer_params_parse
#    define common_init                     pinfer_common_init
#    define sigaction(sig, action, previous) pinfer_signal_handler_set(sig, action)
#endif
