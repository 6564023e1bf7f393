// leave.h: the ways out: one line for the user, the terminal as it was, an exit code.
#pragma once

#include <string>

enum {
    PINFER_EXIT_ERROR       = 1,
    PINFER_EXIT_USAGE       = 2,
    PINFER_EXIT_INTERRUPTED = 130,
    PINFER_EXIT_CLOSED_PIPE = 141,  // as a shell reports a program that dies of SIGPIPE
};

// One line on stderr: "pinfer: ..." or "note: ...". Line breaks in the text become spaces.
void pinfer_say_error(const std::string & text);
void pinfer_say_note(const std::string & text);

// Ends the process at once, the terminal restored. May be called in a signal handler.
[[noreturn]] void pinfer_leave(int code);

// From now on a crash, an assertion of ggml or an uncaught exception ends the process with one line that names the model.
void pinfer_catch_crashes(const std::string & model_path);
