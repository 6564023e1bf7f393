// fuzz_readers.cpp: any bytes as the GGUF of a model, a cold shard, a hot shard or a predictor. A file is refused with one line,
// or every byte that the executors would read of it is there.
#include "artefact.h"
#include "cold.h"
#include "device.h"
#include "header.h"
#include "predictor.h"

#include <cstdlib>
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
        return true;
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
        return true;
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
    return true;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const pinfer_origin origin = origin_of_corpus();
    static const bool          quiet  = (ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr), true);
    if (size < 2 || !quiet) {
        return 0;
    }
    const int fd = memfd_create("input", MFD_CLOEXEC);
    char      path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    std::string err;
    if (write(fd, data + 1, size - 1) == (ssize_t) size - 1) {
        const bool ok = read((char) data[0], path, origin, &err);
        require(ok || (!err.empty() && err.find('\n') == std::string::npos));
    }
    close(fd);
    return 0;
}
