// remote.h: --rpc.
#pragma once

#include "arguments.h"

#include <string>

// Makes devices of the servers that --rpc names, else $PINFER_RPC. Returns false and writes one line into err.
bool pinfer_remote_open(const pinfer_arguments & args, std::string & err);
