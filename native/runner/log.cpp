// log.cpp: one-line messages, and libllama's log caught in a string.
#include "log.h"

#include "llama.h"
#include "text.h"

#include <cctype>
#include <cstdio>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

namespace {

// The log callback may be called from threads of a backend.
std::mutex  log_mutex;
std::string first_error;
bool        log_verbose    = false;
int         stderr_saved   = -1;     // while stderr is caught: the real one, and the memory it goes to
int         stderr_memory  = -1;
bool        log_error_open = false;  // the first error line has not ended yet: continuations belong to it

// "llama_model_load: error loading model: x" -> "error loading model: x"
std::string without_function_name(const std::string & line) {
    size_t i = 0;
    while (i < line.size() && (isalnum((unsigned char) line[i]) || line[i] == '_')) {
        i++;
    }
    if (i > 0 && i + 1 < line.size() && line[i] == ':' && line[i + 1] == ' ') {
        return line.substr(i + 2);
    }
    return line;
}

void on_log(enum ggml_log_level level, const char * text, void *) {
    const std::lock_guard<std::mutex> guard(log_mutex);
    if (log_verbose) {
        fputs(text, stderr);
        fflush(stderr);
    }
    if (level == GGML_LOG_LEVEL_CONT ? !log_error_open : level != GGML_LOG_LEVEL_ERROR || !first_error.empty()) {
        log_error_open = false;
        return;
    }
    std::string line(text);
    log_error_open = line.empty() || line.back() != '\n';
    while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) {
        line.pop_back();
    }
    first_error += line;
}

void say(const char * kind, const std::string & text) {
    std::string line = kind + pinfer_utf8_clean(text);  // a damaged file may be quoted
    for (char & c : line) {
        if (c == '\n' || c == '\r') {
            c = ' ';
        }
    }
    fprintf(stderr, "%s\n", line.c_str());
}

} // namespace

void pinfer_log_install(bool verbose) {
    log_verbose = verbose;
    llama_log_set(on_log, nullptr);
}

std::string pinfer_log_error(void) {
    const std::lock_guard<std::mutex> guard(log_mutex);
    return without_function_name(first_error);
}

void pinfer_log_clear(void) {
    const std::lock_guard<std::mutex> guard(log_mutex);
    first_error.clear();
    log_error_open = false;
}

void pinfer_stderr_catch(void) {
    stderr_memory = log_verbose ? -1 : memfd_create("stderr", MFD_CLOEXEC);
    if (stderr_memory < 0) {
        return;
    }
    fflush(stderr);
    stderr_saved = dup(STDERR_FILENO);
    if (stderr_saved < 0 || dup2(stderr_memory, STDERR_FILENO) < 0) {
        close(stderr_memory);
        stderr_memory = -1;
    }
}

std::string pinfer_stderr_release(void) {
    std::string text;
    fflush(stderr);
    if (stderr_memory >= 0) {
        dup2(stderr_saved, STDERR_FILENO);
        char    bytes[4096];
        ssize_t n = pread(stderr_memory, bytes, sizeof(bytes), 0);
        text.assign(bytes, n > 0 ? (size_t) n : 0);
        close(stderr_memory);
    }
    if (stderr_saved >= 0) {
        close(stderr_saved);
    }
    stderr_memory = stderr_saved = -1;
    return text;
}

void pinfer_say_error(const std::string & text) {
    say("error: ", text);
}

void pinfer_say_note(const std::string & text) {
    say("note: ", text);
}
