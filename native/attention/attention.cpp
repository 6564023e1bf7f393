// attention.cpp: the operation as a whole: what is claimed, how it is shared among threads, and the hook into ggml-cpu.
//
// The unit of work is a block of positions for a group of KV heads of one stream (a cache of its own; several sequences may
// share one). Blocks that a mask hides from every query are not units. Units are counted through all groups, and each thread
// takes an equal, contiguous share: it keeps a partial result, a slot, for every group its share touches. Then the slots of a
// group are added up in the order of the threads. The same number of threads thus always does the same arithmetic.
#include "attention.h"

#include "step.h"
#include "ggml-backend-impl.h"
#include "ggml_cpu.h"
#include "kernels.h"
#include "model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>

static const int     N          = PINFER_BLOCK_POSITIONS;
static const int64_t MAX_TOKENS = 16; // queries a stream: bits of a live_set
static const int64_t LEAST_POSITIONS = 512; // shorter caches are read in no time, and give ggml's very numbers
static const int64_t UNITS_EACH = 16; // at least, for a thread: shares then differ by a 16th at most
static const int     ROWS_AT_ONCE = 64;

typedef uint16_t live_set; // queries that see a position of the block

// --- what is known ----------------------------------------------------------------------------------------------------

enum { PARAM_SCALE = 0, PARAM_MAX_BIAS = 1, PARAM_SOFTCAP = 2, PARAM_PRECISION = 3 };

static float float_param(const ggml_tensor * op, int i) {
    float f;
    memcpy(&f, (const char *) op->op_params + sizeof(float) * (size_t) i, sizeof(f));
    return f;
}

static bool is_cache(const ggml_tensor * t) {
    return pinfer_attention_reads(t->type) && t->nb[0] == ggml_type_size(t->type) && t->ne[0] % N == 0;
}

bool pinfer_attention_knows(const ggml_tensor * op) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT || op->type != GGML_TYPE_F32 || !ggml_is_contiguous(op) ||
        float_param(op, PARAM_MAX_BIAS) != 0.0f || float_param(op, PARAM_SOFTCAP) != 0.0f ||
        (op->op_params[PARAM_PRECISION] != GGML_PREC_DEFAULT && op->op_params[PARAM_PRECISION] != GGML_PREC_F32)) {
        return false;
    }
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    for (int i = 4; i < GGML_MAX_SRC; i++) {
        if (op->src[i]) {
            return false;
        }
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || q->ne[1] > MAX_TOKENS || !is_cache(k) || !is_cache(v) ||
        q->ne[0] != k->ne[0] || v->ne[1] != k->ne[1] || v->ne[2] != k->ne[2] || q->ne[2] % k->ne[2] != 0 ||
        k->ne[3] != q->ne[3] || v->ne[3] != q->ne[3]) {
        return false;
    }
    return !mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(ggml_fp16_t) && mask->ne[0] >= k->ne[1] &&
                     mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 && (mask->ne[3] == 1 || mask->ne[3] == q->ne[3]));
}

// --- sizes ------------------------------------------------------------------------------------------------------------

namespace {

size_t aligned(size_t size) {
    return (size + 63) / 64 * 64;
}

struct shape {
    const ggml_tensor * q, * k, * v, * mask, * out;

    int64_t n_tokens, n_heads, n_kv_heads, n_streams, n_positions, n_blocks, state_size; // of a row, floats

    explicit shape(const ggml_tensor * op) :
        q(op->src[0]), k(op->src[1]), v(op->src[2]), mask(op->src[3]), out(op), n_tokens(q->ne[1]), n_heads(q->ne[2]),
        n_kv_heads(k->ne[2]), n_streams(q->ne[3]), n_positions(k->ne[1]), n_blocks((n_positions + N - 1) / N),
        state_size((v->ne[0] + 2 + N - 1) / N * N) {}

    int64_t heads_each() const { return n_heads / n_kv_heads; }

    // One thread's own memory: which queries see which block, how many blocks are seen, and unpacked positions.
    size_t live_bytes() const { return aligned((size_t) (n_streams * n_blocks) * sizeof(live_set)); }
    size_t count_bytes() const { return aligned((size_t) n_streams * sizeof(int64_t)); }
    size_t unpacked_bytes() const { return (size_t) (N * (k->ne[0] + v->ne[0])) * sizeof(float); }
    size_t thread_bytes() const { return live_bytes() + count_bytes() + unpacked_bytes(); }

    // All slots: most are needed where the heads form one group.
    size_t slot_bytes(int64_t n_threads) const {
        return (size_t) ((n_streams + n_threads - 1) * n_tokens * n_heads * state_size) * sizeof(float);
    }

    size_t bytes(int64_t n_threads) const {
        return 64 + slot_bytes(n_threads) + (size_t) n_threads * thread_bytes();
    }
};

// How the units are counted: group by group, the streams of a head group side by side.
struct division {
    int64_t         n_head_groups;
    int64_t         n_units;
    int64_t         n_threads;
    const int64_t * n_live; // blocks of each stream

    division(const shape & s, const int64_t * live, int64_t threads) : n_threads(threads), n_live(live) {
        int64_t n = 0;
        for (int64_t i = 0; i < s.n_streams; i++) {
            n += n_live[i];
        }
        n_head_groups = 1;
        while (n_head_groups < s.n_kv_heads && (s.n_kv_heads % n_head_groups || n * n_head_groups < UNITS_EACH * threads)) {
            n_head_groups++;
        }
        n_units = n * n_head_groups;
    }

    int64_t begin_of(int64_t thread) const { return n_units * thread / n_threads; }
};

// Everything one thread works with.
struct worker {
    const shape &    s;
    int64_t          ith, nth;
    live_set *       live;   // [stream][block]
    int64_t *        n_live; // [stream]
    float *          unpacked;
    float *          slots;
    pinfer_attend_fn attend = pinfer_attention_step();

    worker(const shape & sh, const pinfer_cpu_thread & t) : s(sh), ith(t.ith), nth(t.nth) {
        char * const base = (char *) aligned((size_t) t.work);
        char * const own  = base + s.slot_bytes(nth) + (size_t) ith * s.thread_bytes();
        slots             = (float *) base;
        live              = (live_set *) own;
        n_live            = (int64_t *) (own + s.live_bytes());
        unpacked          = (float *) (own + s.live_bytes() + s.count_bytes());
    }

    // Slots are numbered thread + group: along the shares either number only grows, so no two have the same sum.
    float * slot(int64_t thread, int64_t group, int64_t heads_in_group) const {
        return slots + (thread + group) * s.n_tokens * heads_in_group * s.state_size;
    }

    const ggml_fp16_t * mask_row(int64_t stream, int64_t token) const {
        return (const ggml_fp16_t *) ((const char *) s.mask->data + (size_t) token * s.mask->nb[1] +
                                      (size_t) (stream % s.mask->ne[3]) * s.mask->nb[3]);
    }
};

// --- which blocks are seen --------------------------------------------------------------------------------------------

const uint16_t MINUS_INFINITY = 0xfc00; // in F16

bool sees_any(const ggml_fp16_t * mask, int64_t n) {
    if (n == N) {
        uint64_t four[N / 4], hidden = 0x0001000100010001u * MINUS_INFINITY, differs = 0;
        memcpy(four, mask, sizeof(four));
        for (uint64_t f : four) {
            differs |= f ^ hidden;
        }
        return differs != 0;
    }
    return std::any_of(mask, mask + n, [](ggml_fp16_t m) { return m != MINUS_INFINITY; });
}

void find_live(const worker & w) {
    const shape & s = w.s;
    for (int64_t stream = 0; stream < s.n_streams; stream++) {
        live_set * const live = w.live + stream * s.n_blocks;
        const live_set   all  = (live_set) ((1u << s.n_tokens) - 1);
        std::fill(live, live + s.n_blocks, s.mask ? (live_set) 0 : all);
        for (int64_t t = 0; s.mask && t < s.n_tokens; t++) {
            const ggml_fp16_t * mask = w.mask_row(stream, t);
            for (int64_t b = 0; b < s.n_blocks; b++) {
                const int64_t n = std::min((int64_t) N, s.n_positions - b * N);
                live[b]         = (live_set) (live[b] | (unsigned) sees_any(mask + b * N, n) << t);
            }
        }
        w.n_live[stream] = s.n_blocks - std::count(live, live + s.n_blocks, (live_set) 0);
    }
}

// --- a thread's share -------------------------------------------------------------------------------------------------

// The masks of a block, one for each query that sees it; those that end within the block are filled up.
struct block_masks {
    ggml_fp16_t         filled[MAX_TOKENS][N];
    const ggml_fp16_t * of[MAX_TOKENS];

    block_masks(const worker & w, int64_t stream, int64_t block, live_set live) {
        const int64_t n = std::min((int64_t) N, w.s.n_positions - block * N);
        for (; live; live = (live_set) (live & (live - 1))) {
            const int t = std::countr_zero(live);
            of[t]       = w.s.mask ? w.mask_row(stream, t) + block * N : filled[t];
            if (n == N && w.s.mask) {
                continue;
            }
            std::fill(filled[t], filled[t] + N, (ggml_fp16_t) MINUS_INFINITY);
            for (int64_t i = 0; i < n; i++) {
                filled[t][i] = w.s.mask ? of[t][i] : (ggml_fp16_t) 0;
            }
            of[t] = filled[t];
        }
    }
};

// A block of K or V, for KV heads [head, head_end), to be fetched in equal parts while the heads of another one are computed.
pinfer_attention_fetch fetch_of(const ggml_tensor * t, int64_t stream, int64_t block, int64_t head, int64_t head_end) {
    const char * at = (const char *) t->data + (size_t) stream * t->nb[3] + (size_t) head * t->nb[2] +
                      (size_t) (std::max(block, (int64_t) 0) * N) * t->nb[1];
    const size_t n  = ((size_t) (head_end - head - 1) * t->nb[2] + ggml_row_size(t->type, t->ne[0]) + 63) / 64;
    return {.at = at, .n = 0, .left_in_row = n, .row_lines = n, .stride = t->nb[1]};
}

size_t lines_each(const pinfer_attention_fetch & f, int64_t n_heads) {
    return (f.row_lines * (size_t) N + (size_t) n_heads - 1) / (size_t) n_heads;
}

// One block, for KV heads [head, head_end) of a stream. next: the block to fetch meanwhile, or -1.
void attend_block(const worker & w, int64_t stream, int64_t block, int64_t next, int64_t head, int64_t head_end, float * slot,
                  bool careful) {
    const shape &     s    = w.s;
    const live_set    live = w.live[stream * s.n_blocks + block];
    const block_masks masks(w, stream, block, live);
    const int64_t     g  = s.heads_each();
    const char *      k  = (const char *) s.k->data + (size_t) stream * s.k->nb[3];
    const char *      v  = (const char *) s.v->data + (size_t) stream * s.v->nb[3];

    pinfer_attention_fetch next_k = fetch_of(s.k, stream, next, head, head_end);
    pinfer_attention_fetch next_v = fetch_of(s.v, stream, next, head, head_end);
    pinfer_attention_row   rows[ROWS_AT_ONCE];
    pinfer_attention_block b = {
        .k                 = nullptr,
        .v                 = nullptr,
        .next_k            = &next_k,
        .next_v            = &next_v,
        .n_ahead           = next < 0 ? 0 : (next - block) * N,
        .k_stride          = s.k->nb[1],
        .v_stride          = s.v->nb[1],
        .k_size            = s.k->ne[0],
        .v_size            = s.v->ne[0],
        .k_type            = s.k->type,
        .v_type            = s.v->type,
        .n_positions       = (int) std::min((int64_t) N, s.n_positions - block * N),
        .scale             = float_param(s.out, PARAM_SCALE),
        .unpacked          = w.unpacked,
        .skip_zero_weights = careful,
        .rows              = rows,
        .n_rows            = 0,
    };
    for (int64_t h = head; h < head_end; h++, slot += s.n_tokens * g * s.state_size) {
        const char * k_head = k + (size_t) h * s.k->nb[2];
        const char * v_head = v + (size_t) h * s.v->nb[2];
        b.k                 = k_head + (size_t) (block * N) * s.k->nb[1];
        b.v                 = v_head + (size_t) (block * N) * s.v->nb[1];
        next_k.n            = next < 0 ? 0 : lines_each(next_k, head_end - head);
        next_v.n            = next < 0 ? 0 : lines_each(next_v, head_end - head);
        for (live_set rest = live; rest; rest = (live_set) (rest & (rest - 1))) {
            const int    t = std::countr_zero(rest);
            const char * q = (const char *) s.q->data + (size_t) t * s.q->nb[1] + (size_t) (h * g) * s.q->nb[2] +
                             (size_t) stream * s.q->nb[3];
            for (int64_t i = 0; i < g; i++) {
                rows[b.n_rows++] = {(const float *) (q + (size_t) i * s.q->nb[2]), masks.of[t], slot + (t * g + i) * s.state_size};
                if (b.n_rows == ROWS_AT_ONCE) {
                    w.attend(&b);
                    b.n_rows = 0;
                }
            }
        }
        if (b.n_rows > 0) {
            w.attend(&b);
            b.n_rows = 0;
        }
    }
}

bool is_finite(const float * state, int64_t n) {
    uint32_t bits[16] = {};
    for (int64_t i = 0; i < n; i += 16) { // n is a multiple of PINFER_BLOCK_POSITIONS
        for (int64_t j = 0; j < 16; j++) {
            uint32_t f;
            memcpy(&f, state + i + j, sizeof(f));
            bits[j] |= (f & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
        }
    }
    return std::all_of(bits, bits + 16, [](uint32_t b) { return b == 0; });
}

// Seen blocks [begin, end) of one group, counted from its first one.
void attend_slot(const worker & w, const division & d, int64_t group, int64_t begin, int64_t end) {
    const shape &    s      = w.s;
    const int64_t    stream = group % s.n_streams;
    const int64_t    n      = s.n_kv_heads / d.n_head_groups, head = group / s.n_streams * n;
    const int64_t    n_rows = s.n_tokens * n * s.heads_each();
    float * const    slot   = w.slot(w.ith, group, n * s.heads_each());
    const live_set * live   = w.live + stream * s.n_blocks;
    for (bool careful : {false, true}) {
        for (int64_t r = 0; r < n_rows; r++) {
            float * state = slot + r * s.state_size;
            std::fill(state, state + s.state_size, 0.0f);
            state[s.v->ne[0]] = -INFINITY;
        }
        int64_t block = 0;
        for (int64_t skip = begin; skip > 0 || !live[block]; block++) {
            skip -= live[block] != 0;
        }
        for (int64_t i = begin; i < end; i++) {
            int64_t next = block + 1;
            while (next < s.n_blocks && !live[next]) {
                next++;
            }
            attend_block(w, stream, block, i + 1 < end ? next : -1, head, head + n, slot, careful);
            block = next;
        }
        bool ok = true;
        for (int64_t r = 0; r < n_rows && ok; r++) {
            ok = is_finite(slot + r * s.state_size, s.v->ne[0]);
        }
        if (ok) {
            return;
        }
    }
}

void attend_share(const worker & w, const division & d) {
    const int64_t begin = d.begin_of(w.ith), end = d.begin_of(w.ith + 1);
    int64_t       first = 0;
    for (int64_t group = 0; group < d.n_head_groups * w.s.n_streams; group++) {
        const int64_t n = d.n_live[group % w.s.n_streams];
        const int64_t a = std::max(begin, first), b = std::min(end, first + n);
        if (a < b) {
            attend_slot(w, d, group, a - first, b - first);
        }
        first += n;
    }
}

// --- the result -------------------------------------------------------------------------------------------------------

// The row of every slot of its group, in the order of the threads; zeros where a query sees nothing.
void merge_row(const worker & w, const division & d, int64_t group, int64_t row, int64_t rows_per_slot, int64_t first, float * out) {
    const shape & s   = w.s;
    const int64_t n   = s.v->ne[0];
    const int64_t end = first + d.n_live[group % s.n_streams];
    float         top = -INFINITY, sum = 0.0f;
    const auto    each = [&](auto && f) {
        for (int64_t t = 0; t < w.nth; t++) {
            if (std::max(first, d.begin_of(t)) < std::min(end, d.begin_of(t + 1))) {
                const float * state = w.slot(t, group, rows_per_slot / s.n_tokens) + row * s.state_size;
                if (state[n + 1] != 0.0f) {
                    f(state);
                }
            }
        }
    };
    each([&](const float * state) { top = state[n] <= top ? top : state[n]; });
    std::fill(out, out + n, 0.0f);
    each([&](const float * state) {
        const float factor = expf(state[n] - top);
        sum += factor * state[n + 1];
        for (int64_t i = 0; i < n; i++) {
            out[i] += factor * state[i];
        }
    });
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t i = 0; i < n; i++) {
        out[i] *= inverse;
    }
}

void merge_share(const worker & w, const division & d) {
    const shape & s             = w.s;
    const int64_t g             = s.heads_each();
    const int64_t heads_each    = s.n_kv_heads / d.n_head_groups; // KV heads of a group
    const int64_t rows_per_slot = s.n_tokens * heads_each * g;
    const int64_t n_groups      = d.n_head_groups * s.n_streams;
    const int64_t n_rows        = n_groups * rows_per_slot;
    const int64_t begin = n_rows * w.ith / w.nth, end = n_rows * (w.ith + 1) / w.nth;
    int64_t       first = 0;
    for (int64_t group = 0; group < n_groups; group++) {
        const int64_t stream = group % s.n_streams;
        for (int64_t r = std::max(begin, group * rows_per_slot); r < std::min(end, (group + 1) * rows_per_slot); r++) {
            const int64_t row  = r - group * rows_per_slot; // [KV head of the group][token][head of the KV head]
            const int64_t head = (group / s.n_streams * heads_each + row / (s.n_tokens * g)) * g + row % g;
            const int64_t t    = row / g % s.n_tokens;
            float * const out  = (float *) s.out->data + ((stream * s.n_tokens + t) * s.n_heads + head) * s.v->ne[0];
            merge_row(w, d, group, row, rows_per_slot, first, out);
        }
        first += d.n_live[stream];
    }
}

// --- the hook ---------------------------------------------------------------------------------------------------------

// Where the decision is noted. Whether a model is in use may change while a graph is computed, but all threads must decide
// alike. Graphs are planned by one thread before each computation, so that is where it is made.
const int     PARAM_OURS = GGML_MAX_OP_PARAMS / sizeof(int32_t) - 1;
const int32_t OURS       = 0x70696e66;

} // namespace

bool pinfer_attention_took(const ggml_tensor * op) {
    return op->op_params[PARAM_OURS] == OURS;
}

namespace {

// PINFER_ATTENTION=always takes caches of any length.
int64_t least_positions() {
    static const int64_t least = [] {
        const char * wanted = getenv("PINFER_ATTENTION");
        return wanted && strcmp(wanted, "always") == 0 ? 0 : LEAST_POSITIONS;
    }();
    return least;
}

class attention_traits : public pinfer_cpu_traits {
  public:
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        const bool ours = pinfer_models_in_use() && op->src[1]->ne[1] >= least_positions() && pinfer_attention_knows(op) &&
                          pinfer_attention_step();
        const_cast<ggml_tensor *>(op)->op_params[PARAM_OURS] = ours ? OURS : 0;
        if (ours) {
            size = shape(op).bytes(n_threads);
        }
        return ours;
    }

    bool compute(pinfer_cpu_thread * thread, ggml_tensor * op) override {
        if (!pinfer_attention_took(op)) {
            return false;
        }
        const shape  s(op);
        const worker w(s, *thread);
        find_live(w);
        const division d(s, w.n_live, w.nth);
        attend_share(w, d);
        ggml_barrier(thread->pool);
        merge_share(w, d);
        return true;
    }
};

class attention_extension : public pinfer_cpu_extension {
  public:
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override { return false; }

    pinfer_cpu_traits * traits_of(const ggml_tensor * op) override {
        return op->op == GGML_OP_FLASH_ATTN_EXT ? &traits : nullptr;
    }

  private:
    attention_traits traits;
};

// A buffer type in name only: it is never offered for weights, and allocates nothing.
const char * buffer_name(ggml_backend_buffer_type_t) {
    return "PINFER_ATTENTION";
}

ggml_backend_buffer_t allocate_nothing(ggml_backend_buffer_type_t, size_t) {
    return nullptr;
}

size_t buffer_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

bool install() {
    // llama.cpp's loader takes its copy of the list at the first question. Asked before the list grows, it never meets our entry.
    ggml_backend_dev_t cpu   = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * const       offer = cpu ? (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
                                   ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts")
                                   : nullptr;
    if (!offer) {
        return false;
    }
    offer(cpu);
    // never freed: the list is used until the end of the process
    static ggml_backend_buffer_type * const entry = new ggml_backend_buffer_type{
        .iface   = {
            .get_name       = buffer_name,
            .alloc_buffer   = allocate_nothing,
            .get_alignment  = buffer_alignment,
            .get_max_size   = nullptr,
            .get_alloc_size = nullptr,
            .is_host        = nullptr,
        },
        .device  = cpu,
        .context = new attention_extension,
    };
    ggml_backend_cpu_get_extra_buffer_types().push_back(entry);
    return true;
}

} // namespace

pinfer_attend_fn pinfer_attention_step(void) {
    static const pinfer_attend_fn step = []() -> pinfer_attend_fn {
        for (const auto * table : {&pinfer_attention_avx512, &pinfer_attention_avx2, &pinfer_attention_scalar}) {
            if (strcmp(table->isa, pinfer_kernel_isa()) == 0) {
                return table->attend;
            }
        }
        return nullptr;
    }();
    return step;
}

void pinfer_attention_install() {
    const char * wanted = getenv("PINFER_ATTENTION");
    const bool   off    = wanted && strcmp(wanted, "off") == 0;
    if (!off && ggml_backend_cpu_get_extra_buffer_types && ggml_barrier) {
        static const bool installed = install();
        (void) installed;
    }
}
