// remote.cpp: the RPC servers of the command line.
#include "remote.h"

#include "pinfer_remote.h"

#include <cstdlib>

bool pinfer_remote_open(const pinfer_arguments & args, std::string & err) {
    const char *      env     = getenv("PINFER_RPC");
    const std::string servers = !args.rpc.empty() ? args.rpc : env ? env : "";
    char              cause[512];
    if (servers.empty() || pinfer_remote_add(servers.c_str(), cause, sizeof(cause))) {
        return true;
    }
    err = cause;
    return false;
}
