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

// One bar in a row; it is in the file after the next flush.
void pinfer_trace_add(const char * name, int row, const pinfer_span & span, int layer, int64_t n_tokens);

// After a flush the file is whole JSON, whatever happens to the process.
void pinfer_trace_flush();
