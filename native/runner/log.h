// log.h: what the runner says on stderr, and what becomes of libllama's own log.
//
// stdout is for text alone. libllama's log is swallowed unless it is asked for, but its first error line is kept: it is
// the cause that a failed load is reported with; those that follow say only that something failed.
#pragma once

#include <string>

// Sends libllama's and ggml's log to stderr (verbose) or nowhere, and keeps its first error line.
void pinfer_log_install(bool verbose);

// First error line libllama logged since pinfer_log_clear(), without its "function: " prefix; empty if there was none.
std::string pinfer_log_error(void);
void        pinfer_log_clear(void);

// Catches what others write to stderr in between (libllama's grammar parser and the plugin's registration do so),
// unless the log is verbose. The text is what was written; its first line usually names the cause.
void        pinfer_stderr_catch(void);
std::string pinfer_stderr_release(void);

// One line on stderr: "error: ..." or "note: ...". Line breaks in the text become blanks.
void pinfer_say_error(const std::string & text);
void pinfer_say_note(const std::string & text);
