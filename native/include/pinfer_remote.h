// pinfer_remote.h: ggml's RPC servers as devices of this process (docs/devices.md). Rules as in pinfer.h.
#pragma once

#include "pinfer.h"

#ifdef __cplusplus
extern "C" {
#endif

// Registers the servers of a list "host:port,host:port"; their devices are RPC0, RPC1, ... in the order of the list.
// One that is registered already is passed over. Returns false for the first that is not there, does not answer within
// seconds, or is of another version; those before it stay registered.
PINFER_API bool pinfer_remote_add(const char * servers, char * err, size_t err_len);

// ggml's RPC client ends the process when its server does. For a message that it aborts with: the line to tell the user
// instead, without a line break. Returns false for every other message.
PINFER_API bool pinfer_remote_explain(const char * message, char * line, size_t line_len);

#ifdef __cplusplus
}
#endif
