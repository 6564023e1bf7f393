// interrupt.cpp: signal handlers. Everything they touch is async-signal-safe: atomics, write(2) and _exit(2).
#include "interrupt.h"

#include "ggml.h"
#include "pinfer_remote.h"

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <initializer_list>
#include <poll.h>
#include <unistd.h>

namespace {

// The sanitizer's own report says more.
#if defined(__SANITIZE_ADDRESS__)
const bool sanitized = true;
#else
const bool sanitized = false;
#endif

std::atomic<int> current_stage{ PINFER_STAGE_LOADING };
std::atomic<int> pending{ 0 };
int              wake_pipe[2] = { -1, -1 };  // any thread may get the signal, so a flag and EINTR are not enough
char             name_of_model[512];

// One line on stderr in one piece; only the first thread that gets here speaks.
[[noreturn]] void leave_saying(std::initializer_list<const char *> parts) {
    static std::atomic<bool> spoken{ false };
    if (spoken.exchange(true)) {
        pause();
    }
    char   line[1024];
    size_t n = 0;
    if (current_stage.load() == PINFER_STAGE_GENERATING && isatty(STDOUT_FILENO) && isatty(STDERR_FILENO)) {
        line[n++] = '\n';  // not at the end of a line of the text
    }
    for (const char * part : parts) {
        const size_t length = strlen(part);
        const size_t fits   = length < sizeof(line) - 1 - n ? length : sizeof(line) - 1 - n;
        memcpy(line + n, part, fits);
        n += fits;
    }
    line[n++] = '\n';
    const ssize_t ignored = write(STDERR_FILENO, line, n);
    (void) ignored;
    _exit(1);
}

[[noreturn]] void leave_with_line(const char * cause) {
    if (current_stage.load() == PINFER_STAGE_LOADING) {
        leave_saying({ "error: ", name_of_model,
                       ": the header is probably damaged, fetch the model again; libllama stopped at ", cause });
    }
    leave_saying({ "error: libggml stopped: ", cause, "; run with -v for its log" });
}

void on_interrupt(int) {
    const int before = pending.fetch_add(1);
    if (current_stage.load() == PINFER_STAGE_LOADING || before > 0) {
        _exit(130);
    }
    const ssize_t ignored = write(wake_pipe[1], "", 1);
    (void) ignored;
}

void on_crash(int sig) {
    if (sig == SIGBUS) {  // a page of a mapped file could not be read
        leave_with_line("a mapped file could not be read, it was cut short or its disk fails");
    }
    if (current_stage.load() == PINFER_STAGE_LOADING) {
        leave_with_line(sig == SIGFPE ? "division by zero" : "invalid memory access");
    }
    signal(sig, SIG_DFL);
    raise(sig);
}

// ggml calls this just before abort(): an assertion of libllama becomes one line.
void on_ggml_abort(const char * message) {
    char line[512];
    if (pinfer_remote_explain(message, line, sizeof(line))) {
        leave_saying({ "error: ", line });
    }
    strncpy(line, message, sizeof(line) - 1);
    line[sizeof(line) - 1] = '\0';
    for (char * c = line; *c; c++) {
        if (*c == '\n') {
            *c = ' ';
        }
    }
    // without the path of the source file it comes from
    const char * slash = strrchr(line, '/');
    leave_with_line(slash ? slash + 1 : line);
}

void handle(int sig, void (*handler)(int)) {
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_handler = handler;
    sigemptyset(&action.sa_mask);
    sigaction(sig, &action, nullptr);
}

} // namespace

void pinfer_interrupt_install(const std::string & model_path) {
    strncpy(name_of_model, model_path.c_str(), sizeof(name_of_model) - 1);
    if (pipe2(wake_pipe, O_CLOEXEC | O_NONBLOCK) != 0) {
        wake_pipe[0] = wake_pipe[1] = -1;  // then a Ctrl-C at the input is seen only after the next line
    }
    handle(SIGINT, on_interrupt);
    handle(SIGPIPE, SIG_IGN);  // a closed stdout is an error of write(), dealt with there
    if (!sanitized) {
        handle(SIGSEGV, on_crash);
        handle(SIGFPE, on_crash);
        handle(SIGBUS, on_crash);
    }
    ggml_set_abort_callback(on_ggml_abort);
    std::set_terminate([] { leave_with_line("an exception was not caught"); });
}

void pinfer_interrupt_stage(enum pinfer_stage stage) {
    current_stage.store(stage);
}

bool pinfer_interrupted(void) {
    return pending.load() > 0;
}

void pinfer_interrupt_reset(void) {
    char bytes[16];
    while (wake_pipe[0] >= 0 && read(wake_pipe[0], bytes, sizeof(bytes)) > 0) {
    }
    pending.store(0);
}

int pinfer_interrupt_fd(void) {
    return wake_pipe[0];
}

bool pinfer_interrupt_abort_callback(void *) {
    return pinfer_interrupted();
}
