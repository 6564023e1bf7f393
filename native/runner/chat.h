// chat.h: the interactive chat. It works the same on a terminal and through a pipe.
#pragma once

#include "arguments.h"
#include "session.h"

#include <cstdint>
#include <string>

// Reads messages from stdin (the first may be given), writes answers to stdout and talk to stderr, until /exit, the end
// of input (0) or Ctrl-C (130). Returns the exit code; what went wrong has been said.
int pinfer_chat(const pinfer_arguments & args, const std::string & grammar, const std::string & first_message,
                uint32_t seed, pinfer_session & session);
