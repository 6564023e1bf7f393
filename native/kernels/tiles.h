// tiles.h: packing of quantised rows into tiles, and their product with several tokens. Part of body.h, see there.
//
// What belongs to the 16 rows of a tile takes TILE_VECS vectors; the primitives work on one of them.
//
//   ivec, ivec_zero, ivec_add         an integer per row
//   tile_load(p)                      four columns of VEC_LANES rows at p, PINFER_TILE_ROWS * 4 bytes apart by column
//   tile_dot<largest>(acc, w, x)      acc + (four columns of every row) . (four values at x), |w| <= largest
//   tile_run<largest>                 how many tile_dot may follow one another before tile_widen
//   tile_widen<largest>(acc)          their sum as an integer per row
//   ivec_to_vec(v)                    the same numbers as floats
//   from_signed(w), SIGNED_CENTRE     w + SIGNED_CENTRE: bytes from -128 to 127 as tile_dot wants them
//   ivec_bits<n>(v, from)             n bits of every byte, from bit `from`
//   transpose_tile(rows, group)       64 bytes of each row into 16 groups of four bytes of every row
//   TILE_TOKENS                       how many tokens are multiplied at once, at most
#pragma once

namespace {

constexpr int TILE_VECS = PINFER_TILE_ROWS / VEC_LANES;

// weight = a * (q - centre); a * q + b; or a or b (first, last 16 columns) times (q - centre).
enum tile_form { TILE_CENTRED, TILE_OFFSET, TILE_HALVES };

template <typename B> constexpr tile_form form             = TILE_CENTRED;
template <> constexpr tile_form           form<block_q4_1> = TILE_OFFSET;
template <> constexpr tile_form           form<block_q5_1> = TILE_OFFSET;
template <> constexpr tile_form           form<block_q4_k> = TILE_OFFSET;
template <> constexpr tile_form           form<block_q5_k> = TILE_OFFSET;
template <> constexpr tile_form           form<block_q6_k> = TILE_HALVES;

// Of the integers of a type: 128 stands for signed bytes.
template <typename B> constexpr int largest             = 15;
template <> constexpr int           largest<block_q5_0> = 31;
template <> constexpr int           largest<block_q5_1> = 31;
template <> constexpr int           largest<block_q5_k> = 31;
template <> constexpr int           largest<block_q6_k> = 63;
template <> constexpr int           largest<block_q8_0> = 128;

template <typename B> constexpr int tile_centre             = centre<B>;
template <> constexpr int           tile_centre<block_q8_0> = SIGNED_CENTRE;

// ---- packing -----------------------------------------------------------------------------------------------------

// The columns of two groups: 64 bytes of each row. The second is absent at the end of an odd number of them. In line,
// as is transpose_tile, so that the rows stay in registers.
[[gnu::always_inline]] inline void store_columns(const int8x64 * rows, tile_group * first, tile_group * second) {
    tile_group spare;
    void *     group[16];
    second = second ? second : &spare;
    for (int c = 0; c < 8; c++) {
        group[c]     = first->q[c];
        group[8 + c] = second->q[c];
    }
    transpose_tile(rows, group);
}

// An F16 of each row.
void store_halves(const uint16_t * halves, float * to) {
    for (int v = 0; v < TILE_VECS; v++) {
        vec_store(to + v * VEC_LANES, vec_load_f16(halves + v * VEC_LANES));
    }
}

template <typename B> void store_scales(const void * const * rows, int64_t i, tile_group * tile) {
    uint16_t d[PINFER_TILE_ROWS], m[PINFER_TILE_ROWS];
    for (int r = 0; r < PINFER_TILE_ROWS; r++) {
        const B * const b = (const B *) rows[r] + i;
        d[r]              = load_u16(b->d);
        if constexpr (form<B> == TILE_OFFSET) {
            m[r] = load_u16(b->m);
        }
    }
    store_halves(d, tile->a);
    if constexpr (form<B> == TILE_OFFSET) {
        store_halves(m, tile->b);
    }
}

template <typename B> void pack_small_blocks(int64_t begin, int64_t end, const void * const * rows, tile_group * tile) {
    for (int64_t i = begin / 32; i < end / 32; i += 2, tile += 2) {
        const bool pair = i + 1 < end / 32;
        int8x64    w[PINFER_TILE_ROWS];
        for (int r = 0; r < PINFER_TILE_ROWS; r++) {
            const B * const a = (const B *) rows[r] + i;
            w[r]              = weights(a, pair ? a + 1 : (const B *) zero_block);
            if constexpr (largest<B> == 128) {
                w[r] = from_signed(w[r]);
            }
        }
        store_columns(w, tile, pair ? tile + 1 : nullptr);
        store_scales<B>(rows, i, tile);
        if (pair) {
            store_scales<B>(rows, i + 1, tile + 1);
        }
    }
}

template <int part, typename B> void pack_part(const void * const * rows, int64_t i, tile_group * tile) {
    int8x64 w[PINFER_TILE_ROWS];
    for (int r = 0; r < PINFER_TILE_ROWS; r++) {
        w[r] = weights<part>((const B *) rows[r] + i);
    }
    store_columns(w, tile + 2 * part, tile + 2 * part + 1);
}

// The 16 floats of a row's block: a of its 8 groups, then b of them; or a and b of one group after the other.
void load_group_floats(const block_q6_k * b, float * s) {
    store_scales_i8(s, b->scales, load_half(b->d));
}

template <typename B> void load_group_floats(const B * b, float * s) {
    const scales_k4 packed = unpack_scales_k4(b->scales);
    store_scales_u8(s, packed.scale, load_half(b->d));
    store_scales_u8(s + 8, packed.min, -load_half(b->dmin));
}

// They are 64 bytes, which are transposed as columns are. All are stored before one is loaded: a load that needs what
// two stores have just written waits for both.
template <typename B> void store_group_floats(const void * const * rows, int64_t i, tile_group * tile) {
    float   s[PINFER_TILE_ROWS][16];
    int8x64 bytes[PINFER_TILE_ROWS];
    for (int r = 0; r < PINFER_TILE_ROWS; r++) {
        load_group_floats((const B *) rows[r] + i, s[r]);
    }
    for (int r = 0; r < PINFER_TILE_ROWS; r++) {
        bytes[r] = load_bytes(s[r]);
    }
    void * to[16];
    for (int g = 0; g < 8; g++) {
        constexpr bool in_turn          = form<B> == TILE_HALVES;
        to[in_turn ? 2 * g : g]         = tile[g].a;
        to[in_turn ? 2 * g + 1 : 8 + g] = tile[g].b;
    }
    transpose_tile(bytes, to);
}

template <typename B> void pack_super_blocks(int64_t begin, int64_t end, const void * const * rows, tile_group * tile) {
    for (int64_t i = begin / 256; i < end / 256; i++, tile += 8) {
        pack_part<0, B>(rows, i, tile);
        pack_part<1, B>(rows, i, tile);
        pack_part<2, B>(rows, i, tile);
        pack_part<3, B>(rows, i, tile);
        store_group_floats<B>(rows, i, tile);
    }
}

template <typename B> void tile_pack(int64_t begin, int64_t end, const void * const * rows, void * tile) {
    if constexpr (sizeof(B) > 64) {
        pack_super_blocks<B>(begin, end, rows, (tile_group *) tile);
    } else {
        pack_small_blocks<B>(begin, end, rows, (tile_group *) tile);
    }
}

template <typename B> struct small_group { using type = tile_group_4; };
template <> struct small_group<block_q8_0> { using type = tile_group_8; };

void copy_columns(const tile_group & whole, tile_group_4 * to) {
    for (int r = 0; r < PINFER_TILE_ROWS; r++) {
        for (int i = 0; i < 16; i++) {
            to->q[i / 4][r][i % 4] = (uint8_t) (whole.q[i / 4][r][i % 4] | whole.q[4 + i / 4][r][i % 4] << 4);
        }
    }
}

void copy_columns(const tile_group & whole, tile_group_8 * to) {
    memcpy(to->q, whole.q, sizeof(to->q));
}

// Through a tile of bytes, since it is done once.
template <typename B> void tile_pack_small(int64_t begin, int64_t end, const void * const * rows, void * tile) {
    auto * to = (typename small_group<B>::type *) tile;
    for (int64_t g = begin / 32; g < end / 32; g++, to++) {
        tile_group whole;
        tile_pack<B>(32 * g, 32 * g + 32, rows, &whole);
        copy_columns(whole, to);
        for (int r = 0; r < PINFER_TILE_ROWS; r++) {
            memcpy(to->a[r], ((const B *) rows[r] + g)->d, sizeof(to->a[r]));
        }
    }
}

// ---- product -----------------------------------------------------------------------------------------------------

// Column c of VEC_LANES rows from row v * VEC_LANES, and their scales.
ivec group_column(const tile_group * g, int c, int v) {
    return tile_load(g->q[c][v * VEC_LANES]);
}

ivec group_column(const tile_group_4 * g, int c, int v) {
    const ivec both = tile_load(g->q[c % 4][v * VEC_LANES]);
    return ivec_bits<4>(both, c / 4 * 4);
}

ivec group_column(const tile_group_8 * g, int c, int v) {
    return tile_load(g->q[c][v * VEC_LANES]);
}

template <int bits> ivec group_column(const tile_group_bits<bits> * g, int c, int v) {
    return ivec_bits<bits>(tile_load(g->q[c % bits][v * VEC_LANES]), c / bits * bits);
}

vec group_scale(const tile_group * g, int part, int v) {
    return vec_load((part == 0 ? g->a : g->b) + v * VEC_LANES);
}

vec group_scale(const tile_group_4 * g, int, int v) {
    return vec_load_f16(g->a[v * VEC_LANES]);
}

vec group_scale(const tile_group_8 * g, int, int v) {
    return vec_load_f16(g->a[v * VEC_LANES]);
}

vec group_offset(const tile_group * g, int v) {
    return vec_load(g->b + v * VEC_LANES);
}

// dots[t] += N columns of four from column `from` times the bytes at x[t] + at.
template <int largest, int N, int T, typename G>
[[gnu::always_inline]] inline void multiply_columns(const G * tile, int from, const char * const * x, int64_t at,
                                                    ivec dots[][TILE_VECS]) {
    constexpr int run = tile_run<largest> < N ? tile_run<largest> : N;
    for (int first = 0; first < N; first += run) {
        ivec sum[T][TILE_VECS];
        for (int t = 0; t < T; t++) {
            for (int v = 0; v < TILE_VECS; v++) {
                sum[t][v] = ivec_zero();
            }
        }
        for (int c = first; c < first + run; c++) {
            for (int v = 0; v < TILE_VECS; v++) {
                const ivec w = group_column(tile, from + c, v);
                for (int t = 0; t < T; t++) {
                    sum[t][v] = tile_dot<largest>(sum[t][v], w, x[t] + at + 4 * c);
                }
            }
        }
        for (int t = 0; t < T; t++) {
            for (int v = 0; v < TILE_VECS; v++) {
                dots[t][v] = ivec_add(dots[t][v], tile_widen<largest>(sum[t][v]));
            }
        }
    }
}

// T tokens whose x lies x_row bytes apart; the sums of a token stay in registers, and so do the addresses of the
// tokens: what belongs to one of them lies at the same distance from each.
template <typename B, int T, typename G>
void multiply_tokens(int64_t n, int64_t begin, int64_t end, const G * tile, const char * x, size_t x_row, float * out,
                     int64_t out_row) {
    constexpr int     parts = form<B> == TILE_HALVES ? 2 : 1, columns = 8 / parts; // of equal scale in a group
    const vec         minus_centre = vec_set1((float) -tile_centre<B>);
    const pinfer_x_q8 first        = x_q8_at(x, n);
    const int64_t     d_at         = (const char *) first.d - x;
    const int64_t     total_at     = (const char *) (parts == 2 ? first.s16 : first.s32) - x;
    const char *      x_t[T];
    vec               sum[T][TILE_VECS];
    for (int t = 0; t < T; t++) {
        x_t[t] = x + (size_t) t * x_row;
        for (int v = 0; v < TILE_VECS; v++) {
            sum[t][v] = vec_load(out + t * out_row + v * VEC_LANES);
        }
    }
    for (int64_t g = begin / 32; g < end / 32; g++, tile++) {
        for (int p = 0; p < parts; p++) {
            ivec dots[T][TILE_VECS];
            for (int t = 0; t < T; t++) {
                for (int v = 0; v < TILE_VECS; v++) {
                    dots[t][v] = ivec_zero();
                }
            }
            multiply_columns<largest<B>, columns, T>(tile, p * columns, x_t, 32 * g + 4 * p * columns, dots);
            for (int t = 0; t < T; t++) {
                const vec d     = vec_set1(load_f32(x_t[t] + d_at + 4 * g));
                const vec total = vec_set1(load_f32(x_t[t] + total_at + 4 * (parts * g + p)));
                for (int v = 0; v < TILE_VECS; v++) {
                    vec dot = vec_mul(ivec_to_vec(dots[t][v]), d);
                    if constexpr (form<B> == TILE_OFFSET) {
                        sum[t][v] = vec_fma(group_offset(tile, v), total, sum[t][v]);
                    } else if constexpr (tile_centre<B> != 0) {
                        dot = vec_fma(minus_centre, total, dot);
                    }
                    sum[t][v] = vec_fma(dot, group_scale(tile, p, v), sum[t][v]);
                }
            }
        }
    }
    for (int t = 0; t < T; t++) {
        for (int v = 0; v < TILE_VECS; v++) {
            vec_store(out + t * out_row + v * VEC_LANES, sum[t][v]);
        }
    }
}

// Numbers of a few bits: what is taken off the unsigned ones is the same for every row.
template <typename B, int T, int bits>
void multiply_tokens(int64_t n, int64_t begin, int64_t end, const tile_group_bits<bits> * tile, const char * x, size_t x_row,
                     float * out, int64_t out_row) {
    const pinfer_x_q8 first = x_q8_at(x, n);
    const int64_t     d_at = (const char *) first.d - x, total_at = (const char *) first.s32 - x;
    const char *      x_t[T];
    vec               sum[T][TILE_VECS];
    float             total[T];
    for (int t = 0; t < T; t++) {
        x_t[t]   = x + (size_t) t * x_row;
        total[t] = 0.0f;
        for (int v = 0; v < TILE_VECS; v++) {
            sum[t][v] = vec_load(out + t * out_row + v * VEC_LANES);
        }
    }
    for (int64_t g = begin / 32; g < end / 32; g++, tile++) {
        ivec dots[T][TILE_VECS];
        for (int t = 0; t < T; t++) {
            for (int v = 0; v < TILE_VECS; v++) {
                dots[t][v] = ivec_zero();
            }
        }
        multiply_columns<15, 8, T>(tile, 0, x_t, 32 * g, dots);
        for (int t = 0; t < T; t++) {
            const vec twice = vec_set1(2.0f * load_f32(x_t[t] + d_at + 4 * g));
            total[t] += load_f32(x_t[t] + total_at + 4 * g);
            for (int v = 0; v < TILE_VECS; v++) {
                sum[t][v] = vec_fma(ivec_to_vec(dots[t][v]), twice, sum[t][v]);
            }
        }
    }
    for (int t = 0; t < T; t++) {
        const vec off = vec_set1((float) -((1 << bits) - 1) * total[t]);
        for (int v = 0; v < TILE_VECS; v++) {
            vec_store(out + t * out_row + v * VEC_LANES, vec_add(sum[t][v], off));
        }
    }
}

// As many times T tokens as there are, then the rest by halves of T.
template <typename B, int T, typename G>
void multiply_blocks(int64_t n, int64_t begin, int64_t end, const G * tile, const char * x, size_t x_row,
                     int64_t n_tokens, float * out, int64_t out_row) {
    for (; n_tokens >= T; n_tokens -= T, x += T * x_row, out += T * out_row) {
        multiply_tokens<B, T>(n, begin, end, tile, x, x_row, out, out_row);
    }
    if constexpr (T > 1) {
        multiply_blocks<B, T / 2>(n, begin, end, tile, x, x_row, n_tokens, out, out_row);
    }
}

template <typename B>
void tile_multiply(int64_t n, int64_t begin, int64_t end, const void * tile, const void * x, size_t x_row,
                   int64_t n_tokens, float * out, int64_t out_row) {
    const tile_group * g = (const tile_group *) tile;
    multiply_blocks<B, TILE_TOKENS>(n, begin, end, g, (const char *) x, x_row, n_tokens, out, out_row);
}

template <typename B>
void tile_multiply_small(int64_t n, int64_t begin, int64_t end, const void * tile, const void * x, size_t x_row,
                         int64_t n_tokens, float * out, int64_t out_row) {
    const auto * g = (const typename small_group<B>::type *) tile;
    multiply_blocks<B, TILE_TOKENS>(n, begin, end, g, (const char *) x, x_row, n_tokens, out, out_row);
}

template <int bits>
void tile_multiply_bits(int64_t n, int64_t begin, int64_t end, const void * tile, const void * x, size_t x_row,
                        int64_t n_tokens, float * out, int64_t out_row) {
    const tile_group_bits<bits> * g = (const tile_group_bits<bits> *) tile;
    multiply_blocks<void, TILE_TOKENS>(n, begin, end, g, (const char *) x, x_row, n_tokens, out, out_row);
}

} // namespace
