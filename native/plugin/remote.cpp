// remote.cpp: RPC servers, asked with a connection of our own before ggml's client meets them: it waits for ever on a
// server that says nothing, and ends the process on one that is not there or of another version.
#include "pinfer_remote.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string>
#include <sys/socket.h>
#include <unistd.h>
#include <vector>

static const int ANSWER_MS = 4000; // a network that takes longer for a few bytes is of no use to a hot device
static const int ALIVE_MS  = 300;  // for each server when one of them has failed

// The first exchange of the protocol: command and size, then the client's capabilities of transport, here none; back come
// a size, major, minor, patch, padding, and the server's capabilities.
static const uint8_t HELLO       = 14;
static const size_t  CAPS_BYTES  = 24;
static const size_t  REPLY_BYTES = 4 + CAPS_BYTES;

struct remote_server {
    std::string    endpoint;
    ggml_backend_t held; // keeps ggml's one connection open: a server serves one client at a time, the next would wait
};
static std::vector<remote_server> servers; // grows by one thread, before anything is computed

// --- a socket with a time limit ---------------------------------------------------------------------------------------

struct remote_probe {
    int                                   fd = -1;
    std::chrono::steady_clock::time_point deadline;

    explicit remote_probe(int ms) : deadline(std::chrono::steady_clock::now() + std::chrono::milliseconds(ms)) {}
    ~remote_probe() {
        if (fd >= 0) {
            close(fd);
        }
    }
};

// errno is ETIMEDOUT when the time is over.
static bool probe_wait(remote_probe & probe, short events) {
    for (;;) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(probe.deadline - std::chrono::steady_clock::now());
        struct pollfd p = {probe.fd, events, 0};
        const int     n = poll(&p, 1, left.count() > 0 ? (int) left.count() : 0);
        if (n > 0) {
            return true;
        }
        if (n == 0 || errno != EINTR) {
            errno = n == 0 ? ETIMEDOUT : errno;
            return false;
        }
    }
}

static bool probe_connect(remote_probe & probe, const struct sockaddr_in & address) {
    probe.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (probe.fd < 0) {
        return false;
    }
    if (connect(probe.fd, (const struct sockaddr *) &address, sizeof(address)) == 0) {
        return true;
    }
    if (errno != EINPROGRESS || !probe_wait(probe, POLLOUT)) {
        return false;
    }
    int       cause = 0;
    socklen_t size  = sizeof(cause);
    getsockopt(probe.fd, SOL_SOCKET, SO_ERROR, &cause, &size);
    errno = cause;
    return cause == 0;
}

// Bytes that came before the time was over or the other side closed.
static size_t probe_receive(remote_probe & probe, uint8_t * data, size_t size) {
    size_t done = 0;
    while (done < size && probe_wait(probe, POLLIN)) {
        const ssize_t n = recv(probe.fd, data + done, size - done, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
            errno = n == 0 ? ECONNRESET : errno;
            break;
        }
        done += n > 0 ? (size_t) n : 0;
    }
    return done;
}

// --- one server -------------------------------------------------------------------------------------------------------

// As ggml's client will: IPv4 alone.
static bool address_resolve(const std::string & endpoint, struct sockaddr_in & address, std::string & err) {
    const size_t      colon = endpoint.find(':');
    const std::string host  = endpoint.substr(0, colon);
    const std::string port  = colon == std::string::npos ? "" : endpoint.substr(colon + 1);
    if (host.empty() || port.empty() || port.size() > 5 || port.find_first_not_of("0123456789") != std::string::npos ||
        std::stoi(port) < 1 || std::stoi(port) > 65535) {
        err = "'" + endpoint + "' is no RPC server; write host:port, like 192.168.1.5:50052";
        return false;
    }
    struct addrinfo   wanted = {};
    struct addrinfo * found  = nullptr;
    wanted.ai_family         = AF_INET;
    wanted.ai_socktype       = SOCK_STREAM;
    const int status         = getaddrinfo(host.c_str(), port.c_str(), &wanted, &found);
    if (status != 0) {
        err = "there is no host " + host + " (" + gai_strerror(status) + "); check --rpc";
        return false;
    }
    memcpy(&address, found->ai_addr, sizeof(address));
    freeaddrinfo(found);
    return true;
}

static bool version_check(const std::string & endpoint, const struct sockaddr_in & address, std::string & err) {
    remote_probe probe(ANSWER_MS);
    if (!probe_connect(probe, address)) {
        const char * cause = errno == ETIMEDOUT ? "no answer" : strerror(errno);
        err = "there is no RPC server at " + endpoint + " (" + cause + "); start one there, or check --rpc";
        return false;
    }
    uint8_t        hello[1 + sizeof(uint64_t) + CAPS_BYTES] = {HELLO};
    const uint64_t hello_size                               = CAPS_BYTES;
    memcpy(hello + 1, &hello_size, sizeof(hello_size));
    if (send(probe.fd, hello, sizeof(hello), MSG_NOSIGNAL) != (ssize_t) sizeof(hello)) {
        err = endpoint + " broke off the connection; check --rpc";
        return false;
    }
    uint8_t      reply[sizeof(uint64_t) + REPLY_BYTES];
    const size_t n = probe_receive(probe, reply, sizeof(reply));
    if (n < sizeof(reply) && errno == ETIMEDOUT) {
        err = endpoint + " accepts the connection and says nothing; an RPC server serves one program at a time: "
              "end the other one, or check --rpc";
        return false;
    }
    uint64_t reply_size = 0;
    memcpy(&reply_size, reply, sizeof(reply_size));
    if (n < sizeof(reply) || reply_size != REPLY_BYTES) {
        err = endpoint + " is no RPC server, or one of another version; use one of the llama.cpp that pinfer is built on";
        return false;
    }
    const uint8_t * version = reply + sizeof(uint64_t);
    if (version[0] != RPC_PROTO_MAJOR_VERSION || version[1] > RPC_PROTO_MINOR_VERSION) {
        char text[128];
        snprintf(text, sizeof(text), " speaks version %d.%d of the RPC protocol, this libggml %d.%d", version[0],
                 version[1], RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION);
        err = endpoint + text + "; use a server of the llama.cpp that pinfer is built on";
        return false;
    }
    return true;
}

// A computer that vanishes without a word is noticed after about half a minute, not never.
static void connections_watch(const struct sockaddr_in & address) {
    for (int fd = 0; fd < 1024; fd++) {
        struct sockaddr_in peer = {};
        socklen_t          size = sizeof(peer);
        if (getpeername(fd, (struct sockaddr *) &peer, &size) != 0 || peer.sin_family != AF_INET ||
            peer.sin_port != address.sin_port || peer.sin_addr.s_addr != address.sin_addr.s_addr) {
            continue;
        }
        const int on = 1, idle = 10, interval = 5, count = 4, unanswered_ms = 30000;
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
        setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered_ms, sizeof(unanswered_ms));
    }
}

static bool server_add(const std::string & endpoint, std::string & err) {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    const auto         add = rpc ? (ggml_backend_reg_t (*)(const char *)) ggml_backend_reg_get_proc_address(
                                       rpc, "ggml_backend_rpc_add_server")
                                 : nullptr;
    if (!add) {
        err = "this libggml is built without RPC; type: CMAKE_ARGS=\"-DGGML_RPC=on\" make build";
        return false;
    }
    struct sockaddr_in address = {};
    if (!address_resolve(endpoint, address, err)) {
        return false;
    }
    for (const remote_server & known : servers) {
        if (known.endpoint == endpoint) {
            return true;
        }
    }
    if (!version_check(endpoint, address, err)) {
        return false;
    }
    servers.push_back({endpoint, nullptr}); // before ggml meets it: the server may fail at its first question
    ggml_backend_reg_t reg = add(endpoint.c_str());
    if (!reg) {
        servers.pop_back();
        err = "the RPC server " + endpoint + " has no devices; start it with one";
        return false;
    }
    ggml_backend_register(reg);
    servers.back().held = ggml_backend_dev_init(ggml_backend_reg_dev_get(reg, 0), nullptr);
    connections_watch(address);
    return true;
}

bool pinfer_remote_add(const char * list, char * err, size_t err_len) {
    const std::string all = list;
    for (size_t begin = 0; begin <= all.size();) {
        const size_t comma = all.find(',', begin);
        const size_t end   = comma == std::string::npos ? all.size() : comma;
        std::string  cause;
        if (!server_add(all.substr(begin, end - begin), cause)) {
            snprintf(err, err_len, "%s", cause.c_str());
            return false;
        }
        begin = end + 1;
    }
    return true;
}

// --- when one fails ---------------------------------------------------------------------------------------------------

bool pinfer_remote_explain(const char * message, char * line, size_t line_len) {
    if (!strstr(message, "ggml-rpc")) {
        return false;
    }
    std::string all, gone;
    for (const remote_server & server : servers) {
        struct sockaddr_in address = {};
        std::string        ignored;
        remote_probe       probe(ALIVE_MS);
        const bool alive = address_resolve(server.endpoint, address, ignored) && probe_connect(probe, address);
        all += (all.empty() ? "" : ", ") + server.endpoint;
        gone += alive ? "" : (gone.empty() ? "" : ", ") + server.endpoint;
    }
    snprintf(line, line_len, "the connection to the RPC server %s broke off: it was ended, or it failed; start it again, "
             "then repeat the command", gone.empty() ? all.c_str() : gone.c_str());
    return true;
}
