// abort.cpp: ggml gives up by aborting the process. What a user should read then is one line.
#include "state.h"

#include <cstring>
#include <unistd.h>

// "file.cpp:123: cause" -> "cause"
static const char * without_place(const char * message) {
    const char * const colon = strstr(message, ": ");
    return colon && colon[2] ? colon + 2 : message;
}

// Devices that have been given work which they have not returned. No lock: the thread that holds it may be the one that waits.
static std::string at_work() {
    std::string names;
    int         layer = -1;
    for (const auto & hot : pinfer_state_get().hot) {
        const int il = hot->layer_in_flight;
        if (il >= 0) {
            names += (names.empty() ? "" : " or ") + hot->name;
            layer = il;
        }
    }
    return names.empty() ? "a device failed" : "device " + names + " failed in layer " + std::to_string(layer);
}

// Called by any thread, and must not return.
[[noreturn]] static void on_abort(const char * message) {
    std::string cause = without_place(message);
    while (!cause.empty() && (cause.back() == '\n' || cause.back() == '.')) {
        cause.pop_back();
    }
    const std::string line = "error: " + at_work() + " (" + cause + "); see that it runs, or do without it: --device none\n";
    if (write(STDERR_FILENO, line.data(), line.size()) < 0) {
        // nobody is there to read it
    }
    _exit(1); // other threads are still computing: nothing is torn down under them
}

void pinfer_abort_in_one_line(void) {
    ggml_set_abort_callback(on_abort);
}
