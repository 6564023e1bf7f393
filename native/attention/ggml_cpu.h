// ggml_cpu.h: how ggml's CPU backend lets others compute an operation.
//
// The backend keeps a list of "extra" buffer types. Before it computes a node, each of its threads asks the context of every
// entry for traits of that node; where there are some, they are called instead, with the thread's number. The same traits are
// asked for work memory when a graph is planned. None of this is in ggml's public headers: the declarations below repeat the
// layout of the virtual tables and of the parameters in the ggml version that the plugin is built for (PINFER_GGML_VERSION),
// and the plugin refuses to run with another one.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstddef>
#include <vector>

struct ggml_threadpool;

// What a thread is told: number ith of nth, and work memory that all of them share.
struct pinfer_cpu_thread {
    int               ith, nth;
    size_t            work_size;
    void *            work;
    ggml_threadpool * pool;
    bool              reference; // an instruction to use plain code
};

// Both live as long as the process: ggml's list is never emptied, and is used until the end.
class pinfer_cpu_traits {
  public:
    virtual ~pinfer_cpu_traits() = default;
    virtual bool work_size(int n_threads, const ggml_tensor * op, size_t & size) = 0;
    virtual bool compute(pinfer_cpu_thread * thread, ggml_tensor * op)           = 0;
};

class pinfer_cpu_extension {
  public:
    virtual ~pinfer_cpu_extension() = default;
    virtual bool                supports_op(ggml_backend_dev_t device, const ggml_tensor * op) = 0; // of weights in its buffers
    virtual pinfer_cpu_traits * traits_of(const ggml_tensor * op)                              = 0;
};

// Exported by libggml-cpu; null where this one hides them.
__attribute__((weak)) std::vector<ggml_backend_buffer_type_t> & ggml_backend_cpu_get_extra_buffer_types();
extern "C" __attribute__((weak)) void                           ggml_barrier(ggml_threadpool * pool);
