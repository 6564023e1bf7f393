// tiles.h: packing of quantised rows into tiles, and their product with several tokens. Part of body.h, see there.
//
//   ivec, ivec_zero, ivec_to_vec      an integer per row of the tile
//   tile_load(p), tile_dot(acc, w, x) acc + (four columns of every row at p) . (four values at x)
//   flip_sign(w)                      w + 128, as unsigned bytes
//   transpose_tile(rows, group)       64 columns of each row into 16 groups of four columns
#pragma once

static_assert(VEC_LANES == PINFER_TILE_ROWS, "a vector holds one value of each row");

namespace {

// weight = a * (q - centre); a * q + b; or a or b (first, last 16 columns) times (q - 32).
enum tile_kind { TILE_CENTRED_8, TILE_CENTRED_16, TILE_CENTRED_128, TILE_OFFSET, TILE_HALVES_32 };

constexpr float tile_centre(tile_kind kind) {
    return kind == TILE_CENTRED_8 ? 8.0f : kind == TILE_CENTRED_16 ? 16.0f : kind == TILE_CENTRED_128 ? 128.0f : 32.0f;
}

// ---- packing: 64 columns of one row as unsigned bytes, with what the groups of 32 need besides -------------------

struct tile_scales {
    float a[2], b[2];
};

template <typename B> constexpr bool is_super_block                 = sizeof(B) > 64;
template <typename B> constexpr int  block_columns                  = is_super_block<B> ? 256 : 32;
template <typename B> constexpr bool has_offset                     = false;
template <> constexpr bool           has_offset<block_q4_1>         = true;
template <> constexpr bool           has_offset<block_q5_1>         = true;

// Blocks a and b of 32.
template <typename B> int8x64 tile_weights(const B * a, const B * b, tile_scales * s) {
    *s = { { load_half(a->d), load_half(b->d) }, { 0.0f, 0.0f } };
    if constexpr (has_offset<B>) {
        s->b[0] = load_half(a->m);
        s->b[1] = load_half(b->m);
    }
    return weights(a, b);
}

template <> int8x64 tile_weights(const block_q8_0 * a, const block_q8_0 * b, tile_scales * s) {
    *s = { { load_half(a->d), load_half(b->d) }, { 0.0f, 0.0f } };
    return flip_sign(weights(a, b));
}

// Scales of a Q6_K block.
struct scales_16 {
    float scale[16];
};

// Those of part `part` of a block of 256.
template <int part> tile_scales scales_of_part(const scales_k & all) {
    return { { all.scale[2 * part], all.scale[2 * part + 1] }, { all.min[2 * part], all.min[2 * part + 1] } };
}

template <int part> tile_scales scales_of_part(const scales_16 & all) {
    const float * s = all.scale + 4 * part;
    return { { s[0], s[2] }, { s[1], s[3] } };
}

// The two groups of a piece of 64 columns; the second is absent at the end of an odd number of them.
void store_piece(const int8x64 * rows, const tile_scales * s, tile_group * first, tile_group * second) {
    tile_group spare;
    void *     group[16];
    second = second ? second : &spare;
    for (int c = 0; c < 8; c++) {
        group[c]     = first->q[c];
        group[8 + c] = second->q[c];
    }
    transpose_tile(rows, group);
    for (int r = 0; r < PINFER_TILE_ROWS; r++) {
        first->a[r]  = s[r].a[0];
        first->b[r]  = s[r].b[0];
        second->a[r] = s[r].a[1];
        second->b[r] = s[r].b[1];
    }
}

template <typename B> void pack_small_blocks(int64_t begin, int64_t end, const void * const * rows, tile_group * tile) {
    for (int64_t i = begin / 32; i < end / 32; i += 2, tile += 2) {
        const bool  pair = i + 1 < end / 32;
        int8x64     w[PINFER_TILE_ROWS];
        tile_scales s[PINFER_TILE_ROWS];
        for (int r = 0; r < PINFER_TILE_ROWS; r++) {
            const B * const a = (const B *) rows[r] + i;
            w[r]              = tile_weights<B>(a, pair ? a + 1 : (const B *) zero_block, &s[r]);
        }
        store_piece(w, s, tile, pair ? tile + 1 : nullptr);
    }
}

template <int part, typename B, typename S> void pack_part(const void * const * rows, int64_t i, const S * all, tile_group * tile) {
    int8x64     w[PINFER_TILE_ROWS];
    tile_scales s[PINFER_TILE_ROWS];
    for (int r = 0; r < PINFER_TILE_ROWS; r++) {
        w[r] = weights<part>((const B *) rows[r] + i);
        s[r] = scales_of_part<part>(all[r]);
    }
    store_piece(w, s, tile + 2 * part, tile + 2 * part + 1);
}

void load_tile_scales(const block_q6_k * b, scales_16 * s) {
    store_scales_i8(s->scale, b->scales, load_half(b->d));
}

template <typename B> void load_tile_scales(const B * b, scales_k * s) {
    const scales_k4 packed = unpack_scales_k4(b->scales);
    load_scales(b, &packed, 1.0f, s);
}

template <typename B, typename S> void pack_super_blocks(int64_t begin, int64_t end, const void * const * rows, tile_group * tile) {
    for (int64_t i = begin / 256; i < end / 256; i++, tile += 8) {
        S all[PINFER_TILE_ROWS];
        for (int r = 0; r < PINFER_TILE_ROWS; r++) {
            load_tile_scales((const B *) rows[r] + i, &all[r]);
        }
        pack_part<0, B>(rows, i, all, tile);
        pack_part<1, B>(rows, i, all, tile);
        pack_part<2, B>(rows, i, all, tile);
        pack_part<3, B>(rows, i, all, tile);
    }
}

template <typename B, tile_kind kind> void tile_pack(int64_t begin, int64_t end, const void * const * rows, void * tile) {
    if constexpr (!is_super_block<B>) {
        pack_small_blocks<B>(begin, end, rows, (tile_group *) tile);
    } else if constexpr (kind == TILE_HALVES_32) {
        pack_super_blocks<B, scales_16>(begin, end, rows, (tile_group *) tile);
    } else {
        pack_super_blocks<B, scales_k>(begin, end, rows, (tile_group *) tile);
    }
}

// ---- product -----------------------------------------------------------------------------------------------------

// T tokens whose x lies x_row bytes apart; the sums of all rows of a token stay in one register.
template <tile_kind kind, int T>
void multiply_tokens(int64_t n, int64_t begin, int64_t end, const tile_group * tile, const char * x, size_t x_row, float * out,
                     int64_t out_row) {
    pinfer_x_q8 v[T];
    vec         sum[T];
    for (int t = 0; t < T; t++) {
        v[t]   = x_q8_at(x + (size_t) t * x_row, n);
        sum[t] = vec_load(out + t * out_row);
    }
    const vec minus_centre = vec_set1(-tile_centre(kind));
    for (int64_t g = begin / 32; g < end / 32; g++, tile++) {
        const vec a = vec_load(tile->a), b = vec_load(tile->b);
        ivec      low[T], high[T];
        for (int t = 0; t < T; t++) {
            low[t] = high[t] = ivec_zero();
        }
        for (int c = 0; c < 4; c++) {
            const ivec w = tile_load(tile->q[c]);
            for (int t = 0; t < T; t++) {
                low[t] = tile_dot(low[t], w, v[t].q + 32 * g + 4 * c);
            }
        }
        for (int c = 4; c < 8; c++) {
            const ivec w = tile_load(tile->q[c]);
            for (int t = 0; t < T; t++) {
                ivec * const to = kind == TILE_HALVES_32 ? &high[t] : &low[t];
                *to             = tile_dot(*to, w, v[t].q + 32 * g + 4 * c);
            }
        }
        for (int t = 0; t < T; t++) {
            const vec d = vec_set1(v[t].d[g]);
            if constexpr (kind == TILE_OFFSET) {
                sum[t] = vec_fma(vec_mul(ivec_to_vec(low[t]), d), a, sum[t]);
                sum[t] = vec_fma(b, vec_set1(v[t].s32[g]), sum[t]);
            } else if constexpr (kind == TILE_HALVES_32) {
                const vec first = vec_fma(minus_centre, vec_set1(v[t].s16[2 * g]), vec_mul(ivec_to_vec(low[t]), d));
                const vec last  = vec_fma(minus_centre, vec_set1(v[t].s16[2 * g + 1]), vec_mul(ivec_to_vec(high[t]), d));
                sum[t]          = vec_fma(last, b, vec_fma(first, a, sum[t]));
            } else {
                const vec centred = vec_fma(minus_centre, vec_set1(v[t].s32[g]), vec_mul(ivec_to_vec(low[t]), d));
                sum[t]            = vec_fma(centred, a, sum[t]);
            }
        }
    }
    for (int t = 0; t < T; t++) {
        vec_store(out + t * out_row, sum[t]);
    }
}

template <tile_kind kind>
void tile_multiply(int64_t n, int64_t begin, int64_t end, const void * tile, const void * x, size_t x_row, int64_t n_tokens,
                   float * out, int64_t out_row) {
    const tile_group * g = (const tile_group *) tile;
    const char *       v = (const char *) x;
    for (; n_tokens >= 8; n_tokens -= 8, v += 8 * x_row, out += 8 * out_row) {
        multiply_tokens<kind, 8>(n, begin, end, g, v, x_row, out, out_row);
    }
    if (n_tokens >= 4) {
        multiply_tokens<kind, 4>(n, begin, end, g, v, x_row, out, out_row);
        n_tokens -= 4, v += 4 * x_row, out += 4 * out_row;
    }
    if (n_tokens >= 2) {
        multiply_tokens<kind, 2>(n, begin, end, g, v, x_row, out, out_row);
        n_tokens -= 2, v += 2 * x_row, out += 2 * out_row;
    }
    if (n_tokens >= 1) {
        multiply_tokens<kind, 1>(n, begin, end, g, v, x_row, out, out_row);
    }
}

} // namespace
