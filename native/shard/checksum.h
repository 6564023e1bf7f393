// checksum.h: pinfer_checksum() in pieces, and the thread that compares an artefact with its checksums.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

// Every piece but the last is a multiple of 64 bytes.
struct pinfer_checksum_state {
    uint64_t lane[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    uint64_t size    = 0;

    void     add(const void * data, size_t n);
    uint64_t value() const;
};

// Bytes of a file that must have a checksum.
struct pinfer_checked_bytes {
    std::string name; // of the tensor
    size_t      offset = 0, size = 0;
    uint64_t    checksum = 0;
};

// Reads them in the background. What reads the file has to ask is_damaged() as it goes.
class pinfer_verifier {
public:
    pinfer_verifier() = default;
    pinfer_verifier(const pinfer_verifier &) = delete;
    pinfer_verifier & operator=(const pinfer_verifier &) = delete;
    ~pinfer_verifier();

    // Takes fd over.
    void prepare(int fd, std::vector<pinfer_checked_bytes> all);
    // Starts, when it is called first. Where no thread can be made all is read before it returns. Not for two threads at once.
    void begin();
    // Cheap; damage() is the name of the first tensor that differs, once this is true.
    bool is_damaged() const { return state.load(std::memory_order_acquire) == DAMAGED; }
    const std::string & damage() const { return name; }
    // Once it has begun, waits until all was read, at most so long; false where the time was over.
    bool wait(double seconds) const;

private:
    enum { WORKING, WHOLE, DAMAGED };

    void work();

    int                               fd = -1;
    std::vector<pinfer_checked_bytes> all;
    std::string                       name;
    bool                              begun = false;
    std::atomic<int>                  state{WHOLE};
    std::atomic<bool>                 stop{false};
    std::thread                       thread;
};
