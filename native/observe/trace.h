// trace.h: where the time of an FFN goes, as a Chrome trace (PINFER_TRACE=file.json, for chrome://tracing or Perfetto).
#pragma once

#include <cstdint>
#include <ctime>
#include <string>
#include <vector>

// Seconds of a clock that only goes forward.
inline double pinfer_clock() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

struct pinfer_span {
    double begin = 0.0, end = 0.0; // pinfer_clock()

    double seconds() const { return end - begin; }
};

// Opens the file that PINFER_TRACE names, if it does, and writes down the names of the rows: row 0 is the CPU, row 1 the
// first hot device, and so on. A file that cannot be written is said once on stderr, and nothing is traced.
void pinfer_trace_open(const std::vector<std::string> & devices);

bool pinfer_trace_on();

// A bar in a row.
struct pinfer_trace_event {
    const char * name;
    int          row;
    pinfer_span  span;
};

// The bars of one FFN. When this returns the file is whole JSON, whatever happens to the process. From any thread.
void pinfer_trace_add(const std::vector<pinfer_trace_event> & events, int layer, int64_t n_tokens);
