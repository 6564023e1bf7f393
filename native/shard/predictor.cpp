// predictor.cpp: reads predictor.gguf, arranges A and B so that they stream, and multiplies 16 rows at a time. The FFN
// executor calls it, which knows the threads.
#include "predictor.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <sys/mman.h>

static const size_t HUGE_PAGE = 2u << 20;

void pinfer_buffer::allocate(size_t n_bytes) {
    const size_t align = n_bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    const size_t size  = (n_bytes + align - 1) / align * align;
    data               = (uint8_t *) aligned_alloc(align, size);
    if (!data) {
        throw std::bad_alloc();
    }
    if (align == HUGE_PAGE) {
        madvise(data, size, MADV_HUGEPAGE); // a wish
    }
}

pinfer_buffer::~pinfer_buffer() {
    free(data);
}

// The bits of a kind whose B is a copy of the first matrix, 0: another kind.
static int bits_of(const std::string & kind) {
    return kind == "one_bit" ? 1 : kind == "two_bit" ? 2 : 0;
}

static bool damaged(const pinfer_predictor * p, int ffn, const std::string & cause, std::string * err) {
    return pinfer_artefact_damaged(&p->file, pinfer_ffn_title(ffn) + " " + cause, err);
}

static bool read_few_bits(pinfer_predictor * p, int ffn, int bits, int64_t rank, const pinfer_origin & origin, std::string * err) {
    pinfer_predictor_ffn &    f      = p->ffns[(size_t) ffn];
    const std::string         name   = pinfer_ffn_name(ffn);
    const pinfer_ffn_header & header = origin.header.ffns[(size_t) ffn];
    const int64_t             n_embd = header.n_embd();
    const bool                whole  = header.n_experts() == 1 || header.n_ff() % PINFER_TILE_ROWS == 0;
    pinfer_blob               b, t;
    if (rank != n_embd || n_embd % 32 != 0 || !whole) {
        return damaged(p, ffn, "has a shape that its kind does not allow", err);
    }
    if (!pinfer_artefact_tensor(&p->file, name + ".pred_b", GGML_TYPE_I8, n_embd * bits / 8, header.n_neurons(), &b, err) ||
        !pinfer_artefact_tensor(&p->file, name + ".pred_t", GGML_TYPE_F32, header.n_neurons(), 1, &t, err)) {
        return false;
    }
    if (!b.data || !t.data) {
        return damaged(p, ffn, "is incomplete", err);
    }
    f.bits  = bits;
    f.rank  = rank;
    f.n     = header.n_neurons();
    f.b     = b.data;
    f.b_row = (size_t) (n_embd * bits / 8);
    f.t     = (const float *) t.data;
    return true;
}

static bool read_ffn(pinfer_predictor * p, int ffn, const std::string & kind, int64_t rank, const pinfer_origin & origin,
                     std::string * err) {
    pinfer_predictor_ffn &    f      = p->ffns[(size_t) ffn];
    const pinfer_ffn_header & header = origin.header.ffns[(size_t) ffn];
    const int64_t             n_embd = header.n_embd(), n_ff = header.n_ff();
    if (kind == "none") {
        return true;
    }
    if (bits_of(kind)) {
        return read_few_bits(p, ffn, bits_of(kind), rank, origin, err);
    }
    if ((kind != "low_rank" && kind != "mlp") || pinfer_ffn_kind_of(ffn) == PINFER_FFN_EXPERTS) {
        return damaged(p, ffn, "has a predictor of the unknown kind '" + kind + "'", err);
    }
    if (rank == 0 || rank % 32 != 0) {
        return damaged(p, ffn, "has a rank that its kind does not allow", err);
    }
    const std::string name = pinfer_ffn_name(ffn);
    pinfer_blob       a, b, c, t;
    if (!pinfer_artefact_tensor(&p->file, name + ".pred_a", GGML_TYPE_COUNT, n_embd, rank, &a, err) ||
        !pinfer_artefact_tensor(&p->file, name + ".pred_b", GGML_TYPE_COUNT, rank, n_ff, &b, err) ||
        !pinfer_artefact_tensor(&p->file, name + ".pred_c", GGML_TYPE_F32, rank, 1, &c, err) ||
        !pinfer_artefact_tensor(&p->file, name + ".pred_t", GGML_TYPE_F32, n_ff, 1, &t, err)) {
        return false;
    }
    f.a_kernel = a.data ? pinfer_kernel_get(a.type) : nullptr;
    f.b_kernel = b.data ? pinfer_kernel_get(b.type) : nullptr;
    if (!f.a_kernel || !f.b_kernel || !t.data) {
        return damaged(p, ffn, "is incomplete", err);
    }
    f.rank  = rank;
    f.n     = n_ff;
    f.relu  = kind == "mlp";
    f.n_embd = n_embd;
    f.a     = a.data;
    f.c     = (const float *) c.data;
    f.b     = b.data;
    f.t     = (const float *) t.data;
    f.a_row = ggml_row_size(a.type, n_embd);
    f.b_row = ggml_row_size(b.type, rank);
    return true;
}

bool pinfer_predictor_open(pinfer_predictor * p, const char * path, const pinfer_origin & origin, std::string * err) {
    if (!pinfer_artefact_open(&p->file, path, "predictor", origin, err)) {
        return false;
    }
    const size_t             n = p->file.ffns.size();
    std::vector<std::string> kind;
    std::vector<uint32_t>    rank;
    if (!pinfer_gguf_str_array(p->file.gguf, "pinfer.predictor.kind", &kind) ||
        !pinfer_gguf_u32_array(p->file.gguf, "pinfer.predictor.rank", &rank) || kind.size() != n || rank.size() != n) {
        return pinfer_artefact_damaged(&p->file, "it lacks the kind or rank of an FFN", err);
    }
    p->ffns.resize(origin.header.ffns.size());
    for (size_t i = 0; i < n; i++) {
        if (!read_ffn(p, p->file.ffns[i], kind[i], rank[i], origin, err)) {
            return false;
        }
    }
    return true;
}

// The tiles of n rows of `length` values, whose addresses row(j) gives; none where the type has no tiles.
template <typename F>
static void cut(pinfer_tiles * tiles, const pinfer_kernel * kernel, int bits, int64_t length, int64_t n, F row) {
    pinfer_pack_fn pack = nullptr;
    if (bits) {
        tiles->multiply = pinfer_bits_multiply(bits);
        tiles->size     = pinfer_bits_tile_size(bits, length);
    } else if (kernel->pack_small) {
        pack            = kernel->pack_small;
        tiles->multiply = kernel->multiply_small;
        tiles->size     = PINFER_TILE_ROWS * ggml_row_size(kernel->type, length);
    } else {
        pack            = kernel->pack;
        tiles->multiply = kernel->multiply;
        tiles->size     = pinfer_tile_size(length);
    }
    if (!tiles->multiply) {
        return;
    }
    const int64_t groups = (n + PINFER_TILE_ROWS - 1) / PINFER_TILE_ROWS;
    tiles->buffer.allocate((size_t) groups * tiles->size);
#pragma omp parallel for
    for (int64_t g = 0; g < groups; g++) {
        const void * rows[PINFER_TILE_ROWS];
        for (int64_t r = 0; r < PINFER_TILE_ROWS; r++) {
            rows[r] = row(std::min(g * PINFER_TILE_ROWS + r, n - 1));
        }
        uint8_t * const to = tiles->buffer.data + (size_t) g * tiles->size;
        if (bits) {
            pinfer_bits_pack(bits, length, rows, to);
        } else {
            pack(0, length, rows, to);
        }
    }
}

void pinfer_predictor_arrange(pinfer_predictor * p, const std::vector<pinfer_neurons> * neurons) {
    for (const int ffn : p->file.ffns) {
        pinfer_predictor_ffn & layer    = p->ffns[(size_t) ffn];
        const bool             arranged = neurons && pinfer_ffn_kind_of(ffn) != PINFER_FFN_EXPERTS;
        const int64_t          n        = arranged ? (*neurons)[(size_t) ffn].n : layer.n;
        const int32_t *        ids      = arranged ? (*neurons)[(size_t) ffn].ids : nullptr;
        if (layer.rank == 0 || n == 0) {
            continue;
        }
        layer.thresholds.assign((size_t) ((n + PINFER_TILE_ROWS - 1) / PINFER_TILE_ROWS * PINFER_TILE_ROWS),
                                std::numeric_limits<float>::infinity());
        for (int64_t j = 0; j < n; j++) {
            layer.thresholds[(size_t) j] = layer.t[ids ? ids[j] : j];
        }
        cut(&layer.b_tiles, layer.b_kernel, layer.bits, layer.rank, n,
            [&](int64_t j) { return layer.b + (size_t) (ids ? ids[j] : j) * layer.b_row; });
        if (layer.b_tiles.buffer.data) {
            pinfer_artefact_release(layer.b, (size_t) layer.n * layer.b_row);
        }
        if (!layer.bits) {
            cut(&layer.a_tiles, layer.a_kernel, 0, layer.n_embd, layer.rank,
                [&](int64_t j) { return layer.a + (size_t) j * layer.a_row; });
        }
        if (layer.a_tiles.buffer.data) {
            pinfer_artefact_release(layer.a, (size_t) layer.rank * layer.a_row);
        }
    }
}

void pinfer_predictor_hidden(const pinfer_predictor_ffn & p, int64_t begin, int64_t end, const uint8_t * x, size_t x_row,
                             int64_t n_tokens, float * hidden) {
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t r = begin; r < end; r++) {
            hidden[t * p.rank + r] = p.c ? p.c[r] : 0.0f;
        }
    }
    for (int64_t r = begin; r < end; r += PINFER_TILE_ROWS) {
        if (p.a_tiles.buffer.data) {
            const uint8_t * const tile = p.a_tiles.buffer.data + (size_t) (r / PINFER_TILE_ROWS) * p.a_tiles.size;
            p.a_tiles.multiply(p.n_embd, 0, p.n_embd, tile, x, x_row, n_tokens, hidden + r, p.rank);
            continue;
        }
        for (int64_t k = r; k < std::min(end, r + PINFER_TILE_ROWS); k++) {
            float z[PINFER_TILE_ROWS];
            for (int64_t t = 0; t < n_tokens; t += PINFER_TILE_ROWS) {
                const int64_t some = std::min<int64_t>(n_tokens - t, PINFER_TILE_ROWS);
                pinfer_kernel_dot_many(p.a_kernel, p.n_embd, p.a + (size_t) k * p.a_row, x + (size_t) t * x_row, x_row, some, z);
                for (int64_t i = 0; i < some; i++) {
                    hidden[(t + i) * p.rank + k] += z[i];
                }
            }
        }
    }
    for (int64_t t = 0; p.relu && t < n_tokens; t++) {
        for (int64_t r = begin; r < end; r++) {
            hidden[t * p.rank + r] = std::max(hidden[t * p.rank + r], 0.0f);
        }
    }
}

void pinfer_predictor_scores(const pinfer_predictor_ffn & p, const int32_t * ids, int64_t j, int64_t n, const uint8_t * z,
                             size_t z_row, int64_t n_tokens, float * score) {
    std::fill(score, score + n_tokens * PINFER_TILE_ROWS, 0.0f);
    if (p.b_tiles.buffer.data) {
        const uint8_t * const tile = p.b_tiles.buffer.data + (size_t) (j / PINFER_TILE_ROWS) * p.b_tiles.size;
        p.b_tiles.multiply(p.rank, 0, p.rank, tile, z, z_row, n_tokens, score, PINFER_TILE_ROWS);
        return;
    }
    for (int64_t r = 0; r < n; r++) {
        const uint8_t * row = p.b + (size_t) (ids ? ids[j + r] : j + r) * p.b_row;
        for (int64_t t = 0; t < n_tokens; t++) {
            score[t * PINFER_TILE_ROWS + r] = pinfer_kernel_dot(p.b_kernel, p.rank, row, z + (size_t) t * z_row);
        }
    }
}
