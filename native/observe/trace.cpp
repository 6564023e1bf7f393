// trace.cpp: writes the trace. Every flush overwrites the end of the array with new events and a new end, so that the
// file of a run that is killed can be read like any other.
#include "trace.h"

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <mutex>
#include <unistd.h>

namespace {

const char END[] = "\n]\n";

struct trace_file {
    std::string path;
    int         fd = -1;
    off_t       size = 0; // without the end
    std::string pending;
};

std::mutex        mutex; // models are computed at the same time
std::atomic<bool> is_on{false};

trace_file & file() {
    static trace_file * const f = new trace_file; // never destroyed: nothing is left to write at exit
    return *f;
}

void give_up(trace_file & f, const char * what) {
    fprintf(stderr, "pinfer: %s cannot be %s (%s), there will be no trace; set PINFER_TRACE to another file\n", f.path.c_str(),
            what, strerror(errno));
    if (f.fd >= 0) {
        close(f.fd);
    }
    f.fd  = -1;
    is_on = false;
    f.pending.clear();
}

void append(trace_file & f, const std::string & event) {
    f.pending += (f.size == 0 && f.pending.empty() ? "[\n" : ",\n") + event;
}

std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
        }
        out += (unsigned char) c < 0x20 ? ' ' : c;
    }
    return out + "\"";
}

std::string metadata(const char * what, int row, const std::string & name) {
    return "{\"ph\": \"M\", \"name\": \"" + std::string(what) + "\", \"pid\": " + std::to_string(getpid()) +
           ", \"tid\": " + std::to_string(row) + ", \"args\": {\"name\": " + quoted(name) + "}}";
}

void flush(trace_file & f) {
    f.pending += END;
    const ssize_t written = pwrite(f.fd, f.pending.data(), f.pending.size(), f.size);
    if (written != (ssize_t) f.pending.size()) {
        give_up(f, "written to");
        return;
    }
    f.size += written - (off_t) strlen(END);
    f.pending.clear();
}

} // namespace

void pinfer_trace_open(const std::vector<std::string> & devices) {
    std::lock_guard<std::mutex> lock(mutex);
    trace_file &                f    = file();
    const char * const          path = getenv("PINFER_TRACE");
    if (!path || !*path) {
        return;
    }
    if (f.path != path) {
        f.path = path;
        f.size = 0;
        f.fd   = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        if (f.fd < 0) {
            give_up(f, "written");
        }
    }
    if (f.fd < 0) {
        return;
    }
    append(f, metadata("process_name", 0, "pinfer"));
    append(f, metadata("thread_name", 0, "CPU"));
    for (size_t i = 0; i < devices.size(); i++) {
        append(f, metadata("thread_name", (int) i + 1, devices[i]));
    }
    is_on = true;
    flush(f);
}

bool pinfer_trace_on() {
    return is_on;
}

void pinfer_trace_add(const std::vector<pinfer_trace_event> & events, int layer, int64_t n_tokens) {
    std::lock_guard<std::mutex> lock(mutex);
    trace_file &                f = file();
    if (f.fd < 0) {
        return;
    }
    for (const pinfer_trace_event & e : events) {
        char event[256];
        snprintf(event, sizeof(event),
                 "{\"ph\": \"X\", \"name\": \"%s\", \"pid\": %d, \"tid\": %d, \"ts\": %.3f, \"dur\": %.3f, "
                 "\"args\": {\"layer\": %d, \"tokens\": %lld}}",
                 e.name, (int) getpid(), e.row, 1e6 * e.span.begin, 1e6 * e.span.seconds(), layer, (long long) n_tokens);
        append(f, event);
    }
    flush(f);
}
