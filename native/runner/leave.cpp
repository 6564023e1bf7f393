// leave.cpp: what runs in a signal handler here is async-signal-safe: atomics, write(2), tcsetattr(3) and _exit(2).
#include "leave.h"

#include "ggml.h"
#include "pinfer_remote.h"

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <termios.h>
#include <unistd.h>

namespace {

// The sanitizer's own report says more.
#if defined(__SANITIZE_ADDRESS__)
const bool sanitized = true;
#else
const bool sanitized = false;
#endif

char           model_name[512];
struct termios terminal;
bool           terminal_known = false;

void say(const char * kind, std::string text) {
    for (char & c : text) {
        if (c == '\n' || c == '\r') {
            c = ' ';
        }
    }
    fflush(stdout);
    fprintf(stderr, "%s%s\n", kind, text.c_str());
}

// One line on stderr in one piece; only the first thread that gets here speaks.
[[noreturn]] void leave_saying(std::initializer_list<const char *> parts) {
    static std::atomic<bool> spoken{ false };
    if (spoken.exchange(true)) {
        pause();
    }
    char   line[1024];
    size_t n = 0;
    for (const char * part : parts) {
        const size_t length = strlen(part);
        const size_t fits   = length < sizeof(line) - 1 - n ? length : sizeof(line) - 1 - n;
        memcpy(line + n, part, fits);
        n += fits;
    }
    line[n++] = '\n';
    const ssize_t ignored = write(STDERR_FILENO, line, n);
    (void) ignored;
    pinfer_leave(PINFER_EXIT_ERROR);
}

[[noreturn]] void leave_with_cause(const char * cause) {
    leave_saying({ "pinfer: ", model_name, ": llama.cpp stopped (", cause,
                   "); the file may be damaged: fetch it again, or add -v for llama.cpp's log" });
}

void on_crash(int sig) {
    switch (sig) {
        case SIGBUS:  leave_with_cause("a page of a mapped file could not be read");
        case SIGFPE:  leave_with_cause("division by zero");
        default:      leave_with_cause("invalid memory access");
    }
}

// ggml calls this just before abort(): an assertion becomes one line.
void on_ggml_abort(const char * message) {
    char line[512];
    if (pinfer_remote_explain(message, line, sizeof(line))) {
        leave_saying({ "pinfer: ", line });
    }
    strncpy(line, message, sizeof(line) - 1);
    line[sizeof(line) - 1] = '\0';
    for (char * c = line; *c; c++) {
        if (*c == '\n') {
            *c = ' ';
        }
    }
    const char * slash = strrchr(line, '/');  // without the path of the source file
    leave_with_cause(slash ? slash + 1 : line);
}

} // namespace

void pinfer_say_error(const std::string & text) {
    say("pinfer: ", text);
}

void pinfer_say_note(const std::string & text) {
    say("note: ", text);
}

void pinfer_leave(int code) {
    if (terminal_known) {
        tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
    }
    _exit(code);
}

void pinfer_catch_crashes(const std::string & model_path) {
    strncpy(model_name, model_path.c_str(), sizeof(model_name) - 1);
    terminal_known = tcgetattr(STDIN_FILENO, &terminal) == 0;
    if (!sanitized) {
        for (const int sig : { SIGSEGV, SIGFPE, SIGBUS }) {
            signal(sig, on_crash);
        }
    }
    ggml_set_abort_callback(on_ggml_abort);
    std::set_terminate([] {
        // the exception's own words, where it has any
        try {
            std::rethrow_exception(std::current_exception());
        } catch (const std::exception & e) {
            leave_with_cause(e.what());
        } catch (...) {
            leave_with_cause("an exception was not caught");
        }
    });
}
