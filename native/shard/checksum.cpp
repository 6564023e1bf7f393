// checksum.cpp: pinfer_checksum(), as docs/formats.md defines it. Eight independent lanes keep the multiplier busy, so it runs
// at the speed of memory; every step is a bijection of its lane, so no change of one 8-byte word goes unnoticed.
#include "checksum.h"

#include "pinfer.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <sys/syscall.h>
#include <system_error>
#include <unistd.h>

static const int      LANES    = 8;
static const uint64_t MULTIPLY = 0x9e3779b97f4a7c15ull;

static inline uint64_t mix(uint64_t state, uint64_t word) {
    const uint64_t v = (state ^ word) * MULTIPLY;
    return v << 29 | v >> 35;
}

void pinfer_checksum_state::add(const void * data, size_t n) {
    const uint8_t * p = (const uint8_t *) data;
    uint64_t        a[LANES], word[LANES]; // in registers
    memcpy(a, lane, sizeof(a));
    size += n;
    for (; n >= sizeof(word); n -= sizeof(word), p += sizeof(word)) {
        memcpy(word, p, sizeof(word));
        for (int i = 0; i < LANES; i++) {
            a[i] = mix(a[i], word[i]);
        }
    }
    if (n) {
        memset(word, 0, sizeof(word));
        memcpy(word, p, n);
        for (int i = 0; i < LANES; i++) {
            a[i] = mix(a[i], word[i]);
        }
    }
    memcpy(lane, a, sizeof(a));
}

uint64_t pinfer_checksum_state::value() const {
    uint64_t hash = size;
    for (const uint64_t l : lane) {
        hash = mix(hash, l);
    }
    return hash ^ hash >> 32;
}

uint64_t pinfer_checksum(const void * data, size_t size) {
    pinfer_checksum_state state;
    state.add(data, size);
    return state.value();
}

// --- in the background ------------------------------------------------------------------------------------------------

// Read instead of mapped: the pages of the shard would count as this process's memory.
static bool same(int fd, const pinfer_checked_bytes & bytes, uint8_t * piece, size_t room, const std::atomic<bool> & stop) {
    pinfer_checksum_state state;
    for (size_t at = 0; at < bytes.size;) {
        const size_t wanted = std::min(room, bytes.size - at);
        for (size_t done = 0; done < wanted;) {
            const ssize_t got = pread(fd, piece + done, wanted - done, (off_t) (bytes.offset + at + done));
            if (stop) {
                return true;
            }
            if (got <= 0) {
                return false;
            }
            done += (size_t) got;
        }
        state.add(piece, wanted);
        at += wanted;
    }
    return state.value() == bytes.checksum;
}

void pinfer_verifier::work() {
    const size_t room = 1 << 20;
    const auto   piece = std::unique_ptr<uint8_t[]>(new (std::nothrow) uint8_t[room]);
    int          result = WHOLE;
    uint8_t      few[4096];
    for (const pinfer_checked_bytes & bytes : all) {
        if (!same(fd, bytes, piece ? piece.get() : few, piece ? room : sizeof(few), stop)) {
            name   = bytes.name;
            result = DAMAGED;
            break;
        }
    }
    state.store(result, std::memory_order_release);
}

void pinfer_verifier::prepare(int file, std::vector<pinfer_checked_bytes> bytes) {
    fd  = file;
    all = std::move(bytes);
    name.reserve(64);
}

void pinfer_verifier::begin() {
    if (begun || fd < 0) {
        return;
    }
    begun = true;
    state = WORKING;
    try {
        thread = std::thread([this] {
            // what the model reads comes first
            const int self = 1, idle = 3 << 13; // IOPRIO_WHO_PROCESS, IOPRIO_CLASS_IDLE
            syscall(SYS_ioprio_set, self, 0, idle);
            work();
        });
    } catch (const std::system_error &) {
        work();
    }
}

bool pinfer_verifier::wait(double seconds) const {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (state == WORKING && std::chrono::steady_clock::now() < until) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return state != WORKING;
}

pinfer_verifier::~pinfer_verifier() {
    stop = true;
    if (thread.joinable()) {
        thread.join();
    }
    if (fd >= 0) {
        close(fd);
    }
}
