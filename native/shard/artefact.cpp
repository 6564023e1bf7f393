// artefact.cpp: mapping and checking of pinfer's GGUF files, and the fingerprint that ties them to a model.
#include "artefact.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

// The command that makes an artefact of a kind.
const char * maker_of(const char * kind) {
    if (!strcmp(kind, "predictor")) {
        return "pinfer train";
    }
    return !strcmp(kind, "hot") || !strcmp(kind, "cold") ? "pinfer split" : "pinfer profile";
}

// Index of a scalar (or array) key of the wanted type, -1 otherwise: gguf's getters abort on a wrong type.
int64_t find_key(const gguf_context * gguf, const char * key, gguf_type type, bool array) {
    const int64_t id = gguf_find_key(gguf, key);
    if (id < 0) {
        return -1;
    }
    const gguf_type have = gguf_get_kv_type(gguf, id);
    if (array) {
        return have == GGUF_TYPE_ARRAY && gguf_get_arr_type(gguf, id) == type ? id : -1;
    }
    return have == type ? id : -1;
}

bool fail(std::string * err, const std::string & text) {
    return pinfer_refuse(text, err);
}

// Two independent 64-bit multiply-xor chains over 8-byte words: quick, and enough to tell models apart.
struct hash128 {
    uint64_t a = 0x9e3779b97f4a7c15ull;
    uint64_t b = 0xc2b2ae3d27d4eb4full;

    void word(uint64_t w) {
        a = (a ^ w) * 0xff51afd7ed558ccdull;
        a ^= a >> 32;
        b = (b + w) * 0xd6e8feb86659fd93ull;
        b ^= b >> 29;
    }

    void bytes(const uint8_t * p, size_t n) {
        while (n >= 8) {
            uint64_t w;
            memcpy(&w, p, 8);
            word(w);
            p += 8;
            n -= 8;
        }
        uint64_t w = n;
        memcpy((uint8_t *) &w + 1, p, n);
        word(w);
    }
};

// Bytes of a file.
struct region {
    size_t offset = 0, size = 0;
};

const size_t FINGERPRINT_BLOCK = 4096;

// What a fingerprint reads besides the header: of every tensor the first block, and two more at places that differ from tensor
// to tensor; of small tensors all.
std::vector<region> fingerprinted(const gguf_context * gguf, size_t file_size) {
    std::vector<region> out;
    const size_t        base = gguf_get_data_offset(gguf);
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        const size_t begin = base + gguf_get_tensor_offset(gguf, i), size = gguf_get_tensor_size(gguf, i);
        const size_t n_blocks = size / FINGERPRINT_BLOCK;
        if (begin > file_size || size > file_size - begin) {
            out.push_back({begin, size}); // cannot be read, which is told there
        } else if (n_blocks <= 3) {
            for (size_t at = 0; at < size; at += FINGERPRINT_BLOCK) {
                out.push_back({begin + at, std::min(FINGERPRINT_BLOCK, size - at)});
            }
        } else {
            const size_t spread = (size_t) ((uint64_t) (i + 1) * 0x9e3779b97f4a7c15ull >> 32); // golden ratio
            out.push_back({begin, FINGERPRINT_BLOCK});
            out.push_back({begin + (1 + spread % (n_blocks - 1)) * FINGERPRINT_BLOCK, FINGERPRINT_BLOCK});
            out.push_back({begin + (n_blocks - 1) * FINGERPRINT_BLOCK, FINGERPRINT_BLOCK});
        }
    }
    return out;
}

// "reglu", "reglu above 0.01"
std::string described(const char * activation, float threshold) {
    char text[64];
    snprintf(text, sizeof(text), threshold > 0.0f ? "%s above %g" : "%s", activation, (double) threshold);
    return text;
}

bool check_activation(pinfer_artefact * a, const pinfer_origin & origin, std::string * err) {
    std::string name;
    if (!pinfer_gguf_str(a->gguf, "pinfer.activation", &name)) {
        return pinfer_artefact_damaged(a, "it lacks pinfer.activation", err);
    }
    a->rule.act = pinfer_activation_parse(name.c_str());
    pinfer_gguf_f32(a->gguf, "pinfer.activation_threshold", &a->rule.threshold); // 0 where the file does not have it
    const pinfer_rule & wanted = origin.rule;
    // of a model without exact zeros there are shards of experts alone
    const bool known = a->rule.act != PINFER_ACT_GRAPH && (a->rule.act != PINFER_ACT_OTHER || wanted.act == PINFER_ACT_OTHER);
    if (known && std::isfinite(a->rule.threshold) &&
        (wanted.act == PINFER_ACT_GRAPH || (a->rule.act == wanted.act && a->rule.threshold == wanted.threshold))) {
        return true;
    }
    return fail(err, a->path + " was made for activation " + described(name.c_str(), a->rule.threshold) + ", " + origin.model_path +
                         " is run with " + described(pinfer_activation_name(wanted.act), wanted.threshold) + a->remake);
}

// Arrays of the file have an item for each of the model's FFNs.
bool check_ffns(pinfer_artefact * a, const pinfer_origin & origin, std::string * err) {
    std::vector<std::string> names, wanted;
    for (size_t i = 0; i < origin.header.ffns.size(); i++) {
        if (origin.header.ffns[i].n_ff() > 0) {
            wanted.push_back(pinfer_ffn_name((int) i));
            a->ffns.push_back((int) i);
        }
    }
    if (!pinfer_gguf_str_array(a->gguf, "pinfer.ffns", &names)) {
        return pinfer_artefact_damaged(a, "it lacks the list of its FFNs (pinfer.ffns)", err);
    }
    return names == wanted || pinfer_artefact_damaged(a, "its FFNs are not those of the model", err);
}

// Whether an artefact without checksums is refused. Those of pinfer 0.1 have none.
const bool CHECKSUMS_REQUIRED = true;

bool prepare_verifier(pinfer_artefact * a, std::string * err) {
    const int64_t id        = find_key(a->gguf, "pinfer.checksums", GGUF_TYPE_UINT64, true);
    const int64_t n_tensors = gguf_get_n_tensors(a->gguf);
    if (id < 0) {
        return !CHECKSUMS_REQUIRED || n_tensors == 0 || fail(err, a->path + " has no checksums (pinfer.checksums)" + a->remake);
    }
    if ((int64_t) gguf_get_arr_n(a->gguf, id) != n_tensors) {
        return pinfer_artefact_damaged(a, "it does not have a checksum for each tensor", err);
    }
    const uint64_t * const            checksums = (const uint64_t *) gguf_get_arr_data(a->gguf, id);
    std::vector<pinfer_checked_bytes> all;
    for (int64_t i = 0; i < n_tensors; i++) {
        all.push_back({.name     = gguf_get_tensor_name(a->gguf, i),
                       .offset   = gguf_get_data_offset(a->gguf) + gguf_get_tensor_offset(a->gguf, i),
                       .size     = gguf_get_tensor_size(a->gguf, i),
                       .checksum = checksums[i]});
    }
    const int fd = open(a->path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return fail(err, "cannot open " + a->path + ": " + strerror(errno) + a->remake);
    }
    a->verifier.prepare(fd, std::move(all));
    return true;
}

} // namespace

std::string pinfer_artefact_damage(const pinfer_artefact * a) {
    std::string err;
    if (a->verifier.is_damaged()) {
        pinfer_artefact_damaged(a, "tensor " + a->verifier.damage() + " does not have its checksum", &err);
    }
    return err;
}

pinfer_artefact::~pinfer_artefact() {
    if (map) {
        munmap(map, size);
    }
    if (gguf) {
        gguf_free(gguf);
    }
}

bool pinfer_artefact_open(pinfer_artefact * a, const char * path, const char * kind, const pinfer_origin & origin,
                          std::string * err) {
    const std::string remake = std::string("; make it again: ") + maker_of(kind) + " " + origin.model_path;
    a->path   = path;
    a->remake = remake;

    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return fail(err, std::string("cannot open ") + path + ": " + strerror(errno) + remake);
    }
    struct stat st = {};
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size < 32) {
        close(fd);
        return fail(err, std::string(path) + " is not a complete GGUF file" + remake);
    }
    a->gguf = pinfer_gguf_open(path);
    if (!a->gguf) {
        close(fd);
        return fail(err, std::string(path) + " is damaged (its GGUF header cannot be read)" + remake);
    }
    a->size = (size_t) st.st_size;
    void * map = mmap(nullptr, a->size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED) {
        return fail(err, std::string("cannot map ") + path + ": " + strerror(errno));
    }
    a->map = (uint8_t *) map;

    const size_t base = gguf_get_data_offset(a->gguf);
    for (int64_t i = 0; i < gguf_get_n_tensors(a->gguf); i++) {
        const size_t offset = gguf_get_tensor_offset(a->gguf, i);
        const size_t bytes  = gguf_get_tensor_size(a->gguf, i);
        if (base > a->size || offset > a->size - base || bytes > a->size - base - offset) {
            return fail(err, std::string(path) + " is truncated (tensor " + gguf_get_tensor_name(a->gguf, i) +
                                 " reaches beyond its end)" + remake);
        }
    }

    std::string have;
    if (!pinfer_gguf_str(a->gguf, "pinfer.kind", &have) || have != kind) {
        return fail(err, std::string(path) + " is not a pinfer " + kind + " file" + remake);
    }
    uint32_t version = 0;
    if (!pinfer_gguf_u32(a->gguf, "pinfer.format_version", &version) || version != PINFER_FORMAT_VERSION) {
        return fail(err, std::string(path) + " has format version " + std::to_string(version) + ", this pinfer reads " +
                             std::to_string(PINFER_FORMAT_VERSION) + remake);
    }
    if (!pinfer_gguf_str(a->gguf, "pinfer.model.fingerprint", &have) || have != origin.fingerprint) {
        return fail(err, std::string(path) + " was made from another model than " + origin.model_path + remake);
    }
    if (gguf_get_alignment(a->gguf) % 32 != 0) {
        return pinfer_artefact_damaged(a, "its tensors are not aligned to 32 bytes", err);
    }
    return check_activation(a, origin, err) && check_ffns(a, origin, err) && prepare_verifier(a, err);
}

bool pinfer_artefact_tensor(const pinfer_artefact * a, const std::string & name, ggml_type type, int64_t ne0, int64_t ne1,
                            pinfer_blob * out, std::string * err, int64_t ne2) {
    *out             = {};
    const int64_t id = gguf_find_tensor(a->gguf, name.c_str());
    if (id < 0) {
        return true;
    }
    const int64_t * ne = gguf_get_tensor_ne(a->gguf, id);
    out->type          = gguf_get_tensor_type(a->gguf, id);
    if (ne[0] != ne0 || ne[1] != ne1 || ne[2] != ne2 || ne[3] != 1 || (type != GGML_TYPE_COUNT && out->type != type)) {
        return fail(err, a->path + ": tensor " + name + " has an unexpected shape or type" + a->remake);
    }
    memcpy(out->ne, ne, sizeof(out->ne));
    out->size = gguf_get_tensor_size(a->gguf, id);
    out->data = a->map + gguf_get_data_offset(a->gguf) + gguf_get_tensor_offset(a->gguf, id);
    return true;
}

void pinfer_artefact_release(const void * data, size_t size) {
    const size_t    page  = (size_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) data + page - 1) / page * page, end = ((uintptr_t) data + size) / page * page;
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_DONTNEED);
    }
}

bool pinfer_artefact_damaged(const pinfer_artefact * a, const std::string & cause, std::string * err) {
    return fail(err, a->path + " is damaged: " + cause + a->remake);
}

bool pinfer_artefact_units(const pinfer_artefact * a, const pinfer_origin & origin, int ffn, const int32_t ** ids, int64_t * n,
                           std::string * err) {
    const bool        is_stack = pinfer_ffn_kind_of(ffn) == PINFER_FFN_EXPERTS;
    const std::string name     = pinfer_ffn_name(ffn) + (is_stack ? ".experts" : ".neurons");
    const int64_t     id       = gguf_find_tensor(a->gguf, name.c_str());
    *n                         = 0;
    if (id < 0) {
        return true;
    }
    const pinfer_ffn_header & f     = origin.header.ffns[(size_t) ffn];
    const int64_t             most  = is_stack ? f.n_experts() : f.n_ff();
    const int64_t             count = gguf_get_tensor_ne(a->gguf, id)[0];
    pinfer_blob               blob;
    if (!pinfer_artefact_tensor(a, name, GGML_TYPE_I32, count, 1, &blob, err)) {
        return false;
    }
    *ids       = (const int32_t *) blob.data;
    bool known = count >= 1 && count <= most;
    for (int64_t j = 0; known && j < count; j++) {
        known = (*ids)[j] >= 0 && (*ids)[j] < most;
    }
    if (!known) {
        return pinfer_artefact_damaged(a, name + " does not name " + (is_stack ? "experts" : "neurons") + " of the model", err);
    }
    *n = count;
    return true;
}

bool pinfer_refuse(const std::string & text, std::string * err) {
    *err = text;
    for (char & c : *err) {
        c = (unsigned char) c < 0x20 ? ' ' : c;
    }
    return false;
}

gguf_context * pinfer_gguf_open(const char * path) {
    return gguf_init_from_file(path, {.no_alloc = true, .ctx = nullptr});
}

bool pinfer_gguf_u32(const gguf_context * gguf, const char * key, uint32_t * out) {
    const int64_t id    = find_key(gguf, key, GGUF_TYPE_UINT32, false);
    const int64_t small = find_key(gguf, key, GGUF_TYPE_UINT16, false);
    if (id >= 0) {
        *out = gguf_get_val_u32(gguf, id);
    } else if (small >= 0) {
        *out = gguf_get_val_u16(gguf, small);
    }
    return id >= 0 || small >= 0;
}

bool pinfer_gguf_f32(const gguf_context * gguf, const char * key, float * out) {
    const int64_t id = find_key(gguf, key, GGUF_TYPE_FLOAT32, false);
    if (id >= 0) {
        *out = gguf_get_val_f32(gguf, id);
    }
    return id >= 0;
}

bool pinfer_gguf_str(const gguf_context * gguf, const char * key, std::string * out) {
    const int64_t id = find_key(gguf, key, GGUF_TYPE_STRING, false);
    if (id >= 0) {
        *out = gguf_get_val_str(gguf, id);
    }
    return id >= 0;
}

bool pinfer_gguf_u32_array(const gguf_context * gguf, const char * key, std::vector<uint32_t> * out) {
    const int64_t id = find_key(gguf, key, GGUF_TYPE_UINT32, true);
    if (id >= 0) {
        const uint32_t * data = (const uint32_t *) gguf_get_arr_data(gguf, id);
        out->assign(data, data + gguf_get_arr_n(gguf, id));
    }
    return id >= 0;
}

bool pinfer_gguf_str_array(const gguf_context * gguf, const char * key, std::vector<std::string> * out) {
    const int64_t id = find_key(gguf, key, GGUF_TYPE_STRING, true);
    if (id >= 0) {
        out->clear();
        for (size_t i = 0; i < gguf_get_arr_n(gguf, id); i++) {
            out->push_back(gguf_get_arr_str(gguf, id, i));
        }
    }
    return id >= 0;
}

static pinfer_gguf_ptr open_model(const char * path, std::string * err) {
    if (access(path, R_OK) != 0) {
        fail(err, std::string("cannot open ") + path + ": " + strerror(errno));
        return nullptr;
    }
    pinfer_gguf_ptr gguf(pinfer_gguf_open(path));
    if (!gguf) {
        fail(err, std::string(path) + " is not a GGUF file or its header is damaged");
    }
    return gguf;
}

// What pinfer_fingerprint() covers of one file, whose header is gguf.
static bool hash_file(const char * path, const gguf_context * gguf, hash128 * hash, std::string * err) {
    const int   fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st = {};
    if (fd < 0 || fstat(fd, &st) != 0) {
        return fail(err, std::string("cannot open ") + path + ": " + strerror(errno));
    }
    const size_t              header = gguf_get_data_offset(gguf), size = (size_t) st.st_size;
    const std::vector<region> regions = fingerprinted(gguf, size);

    bool ok = header <= size;
    hash->word(size);
    std::vector<uint8_t> buf(ok ? std::max(header, FINGERPRINT_BLOCK) : 0);
    const auto           read_at = [&](size_t offset, size_t n) {
        size_t done = 0;
        while (done < n) {
            const ssize_t got = pread(fd, buf.data() + done, n - done, (off_t) (offset + done));
            if (got <= 0) {
                return false;
            }
            done += (size_t) got;
        }
        hash->bytes(buf.data(), n);
        return true;
    };
    for (const region & r : regions) { // asked for together, so that a disk may serve them in its own order
        posix_fadvise(fd, (off_t) r.offset, (off_t) r.size, POSIX_FADV_WILLNEED);
    }
    ok = ok && read_at(0, header);
    for (const region & r : regions) {
        ok = ok && r.offset + r.size <= size && read_at(r.offset, r.size);
    }
    close(fd);
    return ok || fail(err, std::string(path) + " is truncated or cannot be read");
}

// Of these files, in their order; gguf is the header of the first.
static bool fingerprint(const std::vector<std::string> & files, pinfer_gguf_ptr gguf, std::string * out, std::string * err) {
    hash128 hash;
    for (size_t i = 0; i < files.size(); i++) {
        gguf = i ? open_model(files[i].c_str(), err) : std::move(gguf);
        if (!gguf || !hash_file(files[i].c_str(), gguf.get(), &hash, err)) {
            return false;
        }
    }
    char hex[33];
    snprintf(hex, sizeof(hex), "%016" PRIx64 "%016" PRIx64, hash.a, hash.b);
    *out = hex;
    return true;
}

bool pinfer_fingerprint_files(const std::vector<std::string> & files, std::string * out, std::string * err) {
    return fingerprint(files, open_model(files[0].c_str(), err), out, err);
}

bool pinfer_fingerprint_file(const char * path, std::string * out, std::string * err) {
    std::vector<std::string> files;
    pinfer_gguf_ptr          gguf = open_model(path, err);
    return gguf && pinfer_model_files(gguf.get(), path, pinfer_parts_by_name, &files, err) &&
           fingerprint(files, std::move(gguf), out, err);
}
