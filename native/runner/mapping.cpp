// mapping.cpp: llama.cpp reads, maps and locks a model's file as a whole. Of a model with shards most of that is the FFN, which
// nobody reads. The functions of libc that it calls for this are replaced in this program; they leave those bytes out.
#include "pinfer.h"

#include <cerrno>
#include <cstdint>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

#define EXPORTED __attribute__((visibility("default")))

namespace {

struct range {
    uintptr_t begin, end;
};

std::mutex         mutex;
std::vector<range> unread;  // in mappings of models, whole pages; a mapping that is gone may leave some behind

// Pages that lie wholly in the FFN of the file that is mapped at base.
std::vector<range> unread_of(int fd, uintptr_t base) {
    const std::string  path = "/proc/self/fd/" + std::to_string(fd);
    const uintptr_t    page = (uintptr_t) sysconf(_SC_PAGESIZE);
    std::vector<range> out;
    uint64_t           offset = 0, size = 0;
    for (int32_t i = 0; pinfer_unread(path.c_str(), i, &offset, &size); i++) {
        const uintptr_t begin = (base + offset + page - 1) / page * page, end = (base + offset + size) / page * page;
        if (begin < end) {
            out.push_back({ begin, end });
        }
    }
    return out;
}

// Calls act(begin, size) for every piece of [begin, end) that is read; stops at the first result that is not 0.
template <typename F> int each_read(uintptr_t begin, uintptr_t end, F act) {
    const std::lock_guard<std::mutex> guard(mutex);
    while (begin < end) {
        range next = { end, end };
        for (const range & r : unread) {
            if (r.end > begin && r.begin < next.begin) {
                next = r;
            }
        }
        if (next.begin > begin) {
            if (const int result = act(begin, next.begin - begin)) {
                return result;
            }
        }
        begin = next.end;
    }
    return 0;
}

} // namespace

// Only shared mappings of files are looked at: libraries and memory are mapped privately.
extern "C" EXPORTED void * mmap(void * addr, size_t length, int prot, int flags, int fd, off_t offset) noexcept {
    const bool file = fd >= 0 && offset == 0 && (flags & MAP_TYPE) == MAP_SHARED;
    uint64_t   ignored = 0;
    const bool model = file && pinfer_unread(("/proc/self/fd/" + std::to_string(fd)).c_str(), 0, &ignored, &ignored);
    void *     map = (void *) syscall(SYS_mmap, addr, length, prot, model ? flags & ~MAP_POPULATE : flags, fd, offset);
    if (!model || map == MAP_FAILED) {
        return map;
    }
    const uintptr_t base = (uintptr_t) map;
    {
        const std::lock_guard<std::mutex> guard(mutex);
        std::erase_if(unread, [=](const range & r) { return r.end > base && r.begin < base + length; });
        const std::vector<range> more = unread_of(fd, base);
        unread.insert(unread.end(), more.begin(), more.end());
    }
    if (flags & MAP_POPULATE) {
        each_read(base, base + length, [](uintptr_t begin, size_t size) {
            return syscall(SYS_madvise, begin, size, MADV_POPULATE_READ), 0;  // since Linux 5.14; else they are read when used
        });
    }
    return map;
}

extern "C" EXPORTED int posix_madvise(void * addr, size_t length, int advice) noexcept {
    return each_read((uintptr_t) addr, (uintptr_t) addr + length, [advice](uintptr_t begin, size_t size) {
        return syscall(SYS_madvise, begin, size, advice == POSIX_MADV_DONTNEED ? MADV_NORMAL : advice) == 0 ? 0 : errno;
    });
}

extern "C" EXPORTED int mlock(const void * addr, size_t length) noexcept {
    return each_read((uintptr_t) addr, (uintptr_t) addr + length,
                     [](uintptr_t begin, size_t size) { return (int) syscall(SYS_mlock, begin, size); });
}
