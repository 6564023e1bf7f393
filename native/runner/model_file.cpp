// model_file.cpp: header checks before anything is loaded.
#include "model_file.h"

#include "log.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

// Size of a readable regular file that begins with "GGUF"; false with the cause otherwise.
bool file_probe(const std::string & path, const std::string & remedy, uint64_t & size, std::string & err) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        err = errno == ENOENT ? path + " does not exist; check the path of the model"
                              : path + " cannot be read: " + strerror(errno) + "; check the path and its permissions";
        return false;
    }
    struct stat info;
    char        magic[4] = { 0 };
    ssize_t     n        = 0;
    const bool  regular  = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
    if (regular) {
        n = pread(fd, magic, sizeof(magic), 0);
    }
    close(fd);
    if (!regular) {
        err = path + " is a folder or a device; name the GGUF file in it";
        return false;
    }
    if (n != (ssize_t) sizeof(magic) || memcmp(magic, GGUF_MAGIC, sizeof(magic)) != 0) {
        err = path + (info.st_size == 0 ? " is empty; " : " is not a GGUF file; ") + remedy;
        return false;
    }
    size = (uint64_t) info.st_size;
    return true;
}

// Every tensor of the header must lie within the file.
bool extents_check(const struct gguf_context * gguf, uint64_t size, std::string & err) {
    const uint64_t start = gguf_get_data_offset(gguf);
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        const uint64_t offset = gguf_get_tensor_offset(gguf, i);
        const uint64_t n      = gguf_get_tensor_size(gguf, i);
        if (start > size || offset > size - start || n > size - start - offset) {
            err = std::string("cut short, tensor ") + gguf_get_tensor_name(gguf, i) + " ends at byte " +
                  std::to_string(start + offset + n) + " of a file of " + std::to_string(size);
            return false;
        }
    }
    return true;
}

} // namespace

struct gguf_context * pinfer_gguf_open(const std::string & path, const std::string & remedy, std::string & err) {
    uint64_t size = 0;
    if (!file_probe(path, remedy, size, err)) {
        return nullptr;
    }
    pinfer_log_clear();
    struct gguf_init_params params = {};
    params.no_alloc                = true;
    struct gguf_context * gguf     = gguf_init_from_file(path.c_str(), params);
    if (!gguf) {
        const std::string cause = pinfer_log_error();
        err = path + ": damaged or cut short GGUF header" + (cause.empty() ? "" : " (" + cause + ")") + "; " + remedy;
        return nullptr;
    }
    std::string cause;
    if (!extents_check(gguf, size, cause)) {
        err = path + ": " + cause + "; " + remedy;
        gguf_free(gguf);
        return nullptr;
    }
    return gguf;
}

std::string pinfer_gguf_string(const struct gguf_context * gguf, const char * key, const std::string & fallback) {
    const int64_t id = gguf_find_key(gguf, key);
    if (id < 0 || gguf_get_kv_type(gguf, id) != GGUF_TYPE_STRING) {
        return fallback;
    }
    return gguf_get_val_str(gguf, id);
}

uint64_t pinfer_gguf_uint(const struct gguf_context * gguf, const char * key, uint64_t fallback) {
    const int64_t id = gguf_find_key(gguf, key);
    if (id < 0) {
        return fallback;
    }
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_UINT16: return gguf_get_val_u16(gguf, id);
        case GGUF_TYPE_UINT32: return gguf_get_val_u32(gguf, id);
        case GGUF_TYPE_UINT64: return gguf_get_val_u64(gguf, id);
        default:               return fallback;
    }
}

// pinfer.ffn.activation_threshold, 0 where there is none; false when it is no finite number >= 0.
static bool threshold_read(const struct gguf_context * gguf, float & threshold) {
    const int64_t id = gguf_find_key(gguf, "pinfer.ffn.activation_threshold");
    threshold        = 0.0f;
    if (id < 0) {
        return true;
    }
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_FLOAT32: threshold = gguf_get_val_f32(gguf, id); break;
        case GGUF_TYPE_FLOAT64: threshold = (float) gguf_get_val_f64(gguf, id); break;
        default:                return false;
    }
    return std::isfinite(threshold) && threshold >= 0.0f;
}

bool pinfer_model_file_open(const std::string & path, pinfer_model_file & model, std::string & err) {
    struct gguf_context * gguf = pinfer_gguf_open(path, "fetch the model again", err);
    if (!gguf) {
        return false;
    }
    model.path       = path;
    model.arch       = pinfer_gguf_string(gguf, "general.architecture", "");
    model.activation = pinfer_gguf_string(gguf, "pinfer.ffn.activation", "");
    model.n_split    = (uint32_t) pinfer_gguf_uint(gguf, "split.count", 1);
    const bool threshold_ok = threshold_read(gguf, model.threshold);
    const bool empty = gguf_get_n_tensors(gguf) == 0;
    const std::string kind = pinfer_gguf_string(gguf, "pinfer.kind", "");
    gguf_free(gguf);

    if (!kind.empty()) {
        err = path + " is pinfer's " + kind + ".gguf of a model, not a model; name the model's GGUF";
    } else if (model.arch.empty()) {
        err = path + " has no general.architecture, so it is not a language model; name another GGUF";
    } else if (empty) {
        err = path + " holds no tensors (a vocabulary only?); name another GGUF";
    } else if (!threshold_ok) {
        err = path + ": pinfer.ffn.activation_threshold is no number of 0 or more; convert the model again";
    }
    return err.empty();
}
