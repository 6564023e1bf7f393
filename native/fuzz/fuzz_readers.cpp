// fuzz_readers.cpp: any bytes as the GGUF of a model, a cold shard, a hot shard or a predictor (m, c, h, p), or a valid artefact
// with bytes of its tensors changed (C, H, P). A file is refused with one line, or every byte that the executors would read of
// it is there; a changed tensor is refused, too, or has a checksum that fits.
#include "artefact.h"
#include "cold.h"
#include "device.h"
#include "header.h"
#include "predictor.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

// As the files of the corpus have it.
static const int64_t N_LAYER = 2, N_EMBD = 32, N_FF = 64;

static pinfer_origin origin_of_corpus() {
    pinfer_origin o;
    o.model_path    = "model.gguf";
    o.fingerprint   = "0123456789abcdef0123456789abcdef";
    o.rule          = {PINFER_ACT_REGLU, 0.0f};
    o.header.arch   = "llama";
    o.header.n_embd = N_EMBD;
    pinfer_ffn_header layer;
    layer.gate.ne[0] = layer.up.ne[0] = layer.down.ne[1] = N_EMBD;
    layer.gate.ne[1] = layer.up.ne[1] = layer.down.ne[0] = N_FF;
    o.header.ffns.assign(N_LAYER, layer);
    return o;
}

static volatile uint8_t sink;

static void touch(const uint8_t * data, size_t size) {
    uint8_t sum = 0;
    for (size_t i = 0; i < size; i++) {
        sum = (uint8_t) (sum + data[i]);
    }
    sink = sum;
}

static void touch_rows(const pinfer_rows & rows, int64_t n) {
    if (rows.data) {
        touch(rows.data, rows.stride * (size_t) n);
        touch((const uint8_t *) rows.bias, rows.bias ? (size_t) n * sizeof(float) : 0);
        const std::vector<float>   x((size_t) N_EMBD, 1.0f);
        std::vector<uint8_t>       prepared(pinfer_kernel_prepared_size(rows.kernel->x_type, N_EMBD) + 64);
        pinfer_kernel_prepare(rows.kernel->x_type, x.data(), prepared.data(), N_EMBD);
        for (int64_t j = 0; j < n; j++) {
            pinfer_kernel_dot(rows.kernel, N_EMBD, rows.data + (size_t) j * rows.stride, prepared.data());
        }
    }
}

static void require(bool ok) {
    if (!ok) {
        abort();
    }
}

// --- artefacts to change -----------------------------------------------------------------------------------------------

struct sample {
    std::vector<uint8_t> file;
    size_t               checksums = 0, data = 0; // where they begin
    struct tensor { size_t offset, size; };       // offset in the data
    std::vector<tensor>  tensors;
};

static sample make_sample(char kind) {
    const int64_t n = kind == 'C' ? 48 : 16, first = kind == 'C' ? 0 : 48; // neurons of the shard
    ggml_context * const ctx  = ggml_init({.mem_size = 32 * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true});
    gguf_context * const gguf = gguf_init_empty();
    const auto           add  = [&](int layer, const char * name, ggml_type type, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
        ggml_set_name(t, ("blk." + std::to_string(layer) + "." + name).c_str());
        gguf_add_tensor(gguf, t);
    };
    for (int layer = 0; layer < N_LAYER; layer++) {
        if (kind == 'P') {
            if (layer == 0) {
                add(layer, "pred_a", GGML_TYPE_F16, N_EMBD, 32);
            }
            add(layer, "pred_b", layer == 0 ? GGML_TYPE_F16 : GGML_TYPE_I8, layer == 0 ? 32 : N_EMBD / 8, N_FF);
            add(layer, "pred_t", GGML_TYPE_F32, N_FF, 1);
        } else {
            add(layer, "neurons", GGML_TYPE_I32, n, 1);
            add(layer, "ffn_gate.weight", GGML_TYPE_F16, N_EMBD, n);
            add(layer, "ffn_up.weight", GGML_TYPE_Q8_0, N_EMBD, n);
            kind == 'C' ? add(layer, "ffn_down_t.weight", GGML_TYPE_Q4_0, N_EMBD, n) : add(layer, "ffn_down.weight", GGML_TYPE_F16, n, N_EMBD);
        }
    }
    const char *   kinds[] = {"low_rank", "one_bit"};
    const uint32_t ranks[] = {32, 32};
    gguf_set_arr_str(gguf, "pinfer.predictor.kind", kinds, 2);
    gguf_set_arr_data(gguf, "pinfer.predictor.rank", GGUF_TYPE_UINT32, ranks, 2);
    gguf_set_val_u32(gguf, "pinfer.format_version", PINFER_FORMAT_VERSION);
    gguf_set_val_str(gguf, "pinfer.kind", kind == 'C' ? "cold" : kind == 'H' ? "hot" : "predictor");
    gguf_set_val_str(gguf, "pinfer.model.fingerprint", "0123456789abcdef0123456789abcdef");
    gguf_set_val_u32(gguf, "pinfer.n_layer", N_LAYER);
    gguf_set_val_u32(gguf, "pinfer.n_embd", N_EMBD);
    gguf_set_val_u32(gguf, "pinfer.n_ff", N_FF);
    gguf_set_val_str(gguf, "pinfer.activation", "reglu");
    gguf_set_val_str(gguf, "pinfer.placement.id", "0000000000000000");

    std::vector<uint8_t>  data;
    std::vector<uint64_t> checksums;
    sample                out;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        const sample::tensor t = {gguf_get_tensor_offset(gguf, i), gguf_get_tensor_size(gguf, i)};
        data.resize(GGML_PAD(t.offset + t.size, GGUF_DEFAULT_ALIGNMENT));
        for (size_t k = 0; k < t.size; k++) {
            data[t.offset + k] = (uint8_t) (k * 7 & 0x3b); // numbers of any type
        }
        for (int32_t k = 0; gguf_get_tensor_type(gguf, i) == GGML_TYPE_I32 && k < n; k++) {
            const int32_t id = (int32_t) first + k;
            memcpy(data.data() + t.offset + (size_t) k * sizeof(id), &id, sizeof(id));
        }
        checksums.push_back(pinfer_checksum(data.data() + t.offset, t.size));
        out.tensors.push_back(t);
    }
    gguf_set_arr_data(gguf, "pinfer.checksums", GGUF_TYPE_UINT64, checksums.data(), checksums.size());
    out.data = gguf_get_meta_size(gguf);
    out.file.resize(out.data);
    gguf_get_meta_data(gguf, out.file.data());
    out.checksums = (size_t) ((uint8_t *) memmem(out.file.data(), out.data, checksums.data(), checksums.size() * 8) - out.file.data());
    out.file.insert(out.file.end(), data.begin(), data.end());
    gguf_free(gguf);
    ggml_free(ctx);
    return out;
}

// The sample, where the input [flags, then position (2 bytes) and change (1 byte) of as many bytes as there are] changes it.
// *damaged: a tensor differs from its checksum. Flag 1: checksums are made to fit.
static std::vector<uint8_t> changed_sample(const sample & s, const uint8_t * input, size_t size, bool * damaged) {
    std::vector<uint8_t> file = s.file;
    for (size_t k = 1; k + 3 <= size; k += 3) {
        file[s.data + (size_t) (input[k] | input[k + 1] << 8) % (file.size() - s.data)] ^= input[k + 2];
    }
    *damaged = false;
    for (size_t i = 0; i < s.tensors.size(); i++) {
        const sample::tensor & t = s.tensors[i];
        if (size > 0 && (input[0] & 1)) {
            const uint64_t fits = pinfer_checksum(file.data() + s.data + t.offset, t.size);
            memcpy(file.data() + s.checksums + i * sizeof(fits), &fits, sizeof(fits));
        } else {
            *damaged |= memcmp(file.data() + s.data + t.offset, s.file.data() + s.data + t.offset, t.size) != 0;
        }
    }
    return file;
}

// --- the readers -------------------------------------------------------------------------------------------------------

// Whether the tensors have their checksums; nothing of the file may be relied on before this is known.
static bool is_whole(pinfer_artefact & file, std::string * err) {
    file.verifier.begin();
    while (!file.verifier.wait(0)) {
        sched_yield(); // a hang is for -timeout to notice
    }
    *err = pinfer_artefact_damage(&file);
    return err->empty();
}

static bool read(char kind, const char * path, const pinfer_origin & origin, std::string * err) {
    if (kind == 'm') {
        pinfer_header h;
        const bool    ok = pinfer_header_read(path, &h, err);
        for (const pinfer_ffn_header & l : h.ffns) {
            require(!ok || l.n_ff() == 0 || (l.up.ne[0] == h.n_embd && l.down.ne[0] == l.n_ff()));
        }
        std::string fingerprint;
        return ok && pinfer_fingerprint_file(path, &fingerprint, err);
    }
    if (kind == 'c') {
        pinfer_cold c;
        if (!pinfer_cold_open(&c, path, origin, err)) {
            return false;
        }
        require(c.ffns.size() == (size_t) N_LAYER);
        for (const pinfer_neurons & l : c.ffns) {
            for (int64_t j = 0; j < l.n; j++) {
                require(l.ids[j] >= 0 && l.ids[j] < N_FF);
            }
            touch_rows(l.gate, l.n);
            touch_rows(l.up, l.n);
            touch_rows(l.down, l.n);
        }
        return is_whole(c.file, err);
    }
    if (kind == 'h') {
        pinfer_hot h;
        if (!pinfer_hot_read(&h, path, origin, err)) {
            return false;
        }
        for (const ggml_tensor * t = ggml_get_first_tensor(h.weights); t; t = ggml_get_next_tensor(h.weights, (ggml_tensor *) t)) {
            pinfer_blob blob;
            require(pinfer_artefact_tensor(&h.file, t->name, t->type, t->ne[0], t->ne[1], &blob, err) && blob.size == ggml_nbytes(t));
            touch(blob.data, blob.size);
        }
        return is_whole(h.file, err);
    }
    pinfer_predictor p;
    if (!pinfer_predictor_open(&p, path, origin, err)) {
        return false;
    }
    pinfer_predictor_arrange(&p, nullptr);
    for (const pinfer_predictor_ffn & l : p.ffns) {
        require(l.rank >= 0);
        if (l.rank > 0) {
            touch(l.a, l.a ? l.a_row * (size_t) l.rank : 0);
            touch(l.b, l.b_row * (size_t) N_FF);
        }
    }
    return is_whole(p.file, err);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const pinfer_origin          origin  = origin_of_corpus();
    static const bool                   quiet   = (ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr), true);
    static const std::map<char, sample> samples = {{'C', make_sample('C')}, {'H', make_sample('H')}, {'P', make_sample('P')}};
    if (size < 2 || !quiet) {
        return 0;
    }
    char                 kind    = (char) data[0];
    bool                 damaged = false;
    std::vector<uint8_t> file(data + 1, data + size);
    const auto           s       = samples.find(kind);
    if (s != samples.end()) {
        file = changed_sample(s->second, data + 1, size - 1, &damaged);
        kind = (char) tolower(kind);
    }
    const int fd = memfd_create("input", MFD_CLOEXEC);
    char      path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    std::string err;
    if (write(fd, file.data(), file.size()) == (ssize_t) file.size()) {
        const bool ok = read(kind, path, origin, &err);
        require(ok || (!err.empty() && err.find('\n') == std::string::npos));
        require(!ok || !damaged);
        require(ok || s == samples.end() || size > 4); // as it is, it is read
    }
    close(fd);
    return 0;
}
