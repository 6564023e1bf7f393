// isa.cpp: which kernel tables this machine can run.
#include "tables.h"

#if defined(__x86_64__)
static bool has_avx2(void) {
    // F16C is in every processor that has AVX2.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

struct table_list {
    const struct pinfer_kernel_table * tables[3];
    size_t                             n = 0;

    table_list() {
#if defined(__x86_64__)
        __builtin_cpu_init();
        add(&pinfer_kernels_avx512, has_avx512());
        add(&pinfer_kernels_avx2, has_avx2());
#elif defined(__aarch64__)
        add(&pinfer_kernels_neon, true); // part of the base architecture
#endif
        add(&pinfer_kernels_scalar, true);
    }

    void add(const struct pinfer_kernel_table * table, bool runs) {
        if (runs && table->n > 0) {
            tables[n++] = table;
        }
    }
};

const struct pinfer_kernel_table * const * pinfer_kernel_tables(size_t * n) {
    static const table_list list;
    *n = list.n;
    return list.tables;
}

const struct pinfer_kernel * pinfer_kernel_table_find(const struct pinfer_kernel_table * table, enum ggml_type type) {
    for (size_t i = 0; i < table->n; i++) {
        if (table->kernels[i].type == type) {
            return &table->kernels[i];
        }
    }
    return nullptr;
}
