// fake_device.h: ggml devices that compute on the CPU but are driven as a GPU is: with a queue, or by calls that block; and
// that fail when they are told to.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

enum fake_fault { FAKE_WORKS, FAKE_FAILS, FAKE_THROWS, FAKE_CANNOT_MULTIPLY };

// Lets a computation go on only when so many have begun: proof that they are at work at the same time.
struct fake_meeting {
    std::mutex              mutex;
    std::condition_variable changed;
    int                     wanted = 0, here = 0;
    bool                    missed = false;

    void meet() {
        std::unique_lock<std::mutex> lock(mutex);
        if (wanted == 0) {
            return;
        }
        if (++here == wanted) {
            changed.notify_all();
        }
        missed |= !changed.wait_for(lock, std::chrono::seconds(20), [this] { return here >= wanted; });
    }
};

struct fake_device {
    std::string   name;
    bool          queued; // asynchronous; else every call returns when its work is done
    bool          pinned; // has host memory of its own
    fake_fault    fault    = FAKE_WORKS;
    std::atomic<int> n_graphs{0}; // computed
    int           n_open = 0, most_open = 0; // backends of it
    fake_meeting * meeting = nullptr;

    ggml_backend_device device = {};
    ggml_backend_reg    reg    = {};
};

// A backend: a CPU backend, and the thread that works off its queue.
struct fake_backend {
    fake_device *                     device;
    ggml_backend_t                    cpu = ggml_backend_cpu_init();
    std::deque<std::function<void()>> queue;
    std::mutex                        mutex;
    std::condition_variable           changed;
    bool                              busy = false, end = false;
    std::thread                       thread;

    explicit fake_backend(fake_device * d) : device(d) {
        d->most_open = std::max(d->most_open, ++d->n_open);
        if (d->queued) {
            thread = std::thread([this] { work(); });
        }
    }

    ~fake_backend() {
        if (thread.joinable()) {
            {
                std::lock_guard<std::mutex> lock(mutex);
                end = true;
            }
            changed.notify_all();
            thread.join();
        }
        ggml_backend_free(cpu);
        device->n_open--;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return end || !queue.empty(); });
            if (queue.empty()) {
                return;
            }
            const auto next = queue.front();
            queue.pop_front();
            busy = true;
            lock.unlock();
            next();
            lock.lock();
            busy = false;
            changed.notify_all();
        }
    }

    void push(std::function<void()> what) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            queue.push_back(std::move(what));
        }
        changed.notify_all();
    }

    void synchronize() {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this] { return queue.empty() && !busy; });
    }
};

inline fake_backend * fake_of(ggml_backend_t backend) {
    return (fake_backend *) backend->context;
}

inline fake_device * fake_of(ggml_backend_dev_t device) {
    return (fake_device *) device->context;
}

inline ggml_status fake_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    fake_backend * const b       = fake_of(backend);
    const auto           compute = [b, graph] {
        if (b->device->meeting) {
            b->device->meeting->meet();
        }
        ggml_backend_graph_compute(b->cpu, graph);
        b->device->n_graphs++;
    };
    switch (b->device->fault) {
        case FAKE_FAILS:
            return GGML_STATUS_FAILED;
        case FAKE_THROWS:
            throw std::runtime_error("the cable was pulled");
        case FAKE_WORKS:
        case FAKE_CANNOT_MULTIPLY:
            break;
    }
    if (b->device->queued) {
        b->push(compute);
    } else {
        compute();
    }
    return GGML_STATUS_SUCCESS;
}

// Late: what is sent must still be there then.
inline void fake_set_async(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    fake_of(backend)->push([=] {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        memcpy((char *) t->data + offset, data, size);
    });
}

inline void fake_get_async(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    fake_of(backend)->push([=] { memcpy(data, (const char *) t->data + offset, size); });
}

inline ggml_backend_t fake_init(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = {'p', 'i', 'n', 'f', 'e', 'r', '-', 'f', 'a', 'k', 'e', '-', 't', 'e', 's', 't'};
    const bool       queued = fake_of(device)->queued;
    ggml_backend_i   iface  = {};
    iface.get_name          = [](ggml_backend_t b) { return fake_of(b)->device->name.c_str(); };
    iface.free              = [](ggml_backend_t b) {
        delete fake_of(b);
        delete b;
    };
    iface.set_tensor_async = queued ? fake_set_async : nullptr;
    iface.get_tensor_async = queued ? fake_get_async : nullptr;
    if (queued) {
        iface.synchronize = [](ggml_backend_t b) { fake_of(b)->synchronize(); };
    }
    iface.graph_compute    = fake_graph_compute;
    return new ggml_backend{.guid = &guid, .iface = iface, .device = device, .context = new fake_backend(fake_of(device))};
}

// Puts the device into ggml's registry, for the rest of the process.
inline void fake_register(fake_device * fake) {
    ggml_backend_device_i & iface = fake->device.iface;
    iface.get_name                = [](ggml_backend_dev_t d) { return fake_of(d)->name.c_str(); };
    iface.get_description         = iface.get_name;
    iface.get_memory              = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t) 1 << 30; };
    iface.get_type                = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    iface.get_props               = [](ggml_backend_dev_t d, ggml_backend_dev_props * props) {
        *props            = {};
        props->name       = fake_of(d)->name.c_str();
        props->type       = GGML_BACKEND_DEVICE_TYPE_GPU;
        props->caps.async = fake_of(d)->queued;
    };
    iface.init_backend         = fake_init;
    iface.supports_op          = [](ggml_backend_dev_t d, const ggml_tensor * op) {
        return op->op != GGML_OP_MUL_MAT || fake_of(d)->fault != FAKE_CANNOT_MULTIPLY;
    };
    iface.get_buffer_type      = [](ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); };
    iface.get_host_buffer_type = [](ggml_backend_dev_t d) {
        return fake_of(d)->pinned ? ggml_backend_cpu_buffer_type() : nullptr;
    };
    fake->reg.api_version            = GGML_BACKEND_API_VERSION;
    fake->reg.iface.get_name         = [](ggml_backend_reg_t) { return "FAKE"; };
    fake->reg.iface.get_device_count = [](ggml_backend_reg_t) { return (size_t) 0; };
    fake->reg.iface.get_proc_address = [](ggml_backend_reg_t, const char *) { return (void *) nullptr; };
    fake->device.reg     = &fake->reg;
    fake->device.context = fake;
    ggml_backend_device_register(&fake->device);
}
