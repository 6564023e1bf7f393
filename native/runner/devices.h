// devices.h: the ggml devices of a run: those of the hot neurons, that of the dense layers, and what they hold.
#pragma once

#include "artefacts.h"
#include "llama.h"

#include <string>
#include <vector>

struct pinfer_device {
    ggml_backend_dev_t device = nullptr;
    std::vector<int>   hot;               // numbers of the hot shards that lie there
    uint64_t           needed     = 0;    // bytes the placement takes of it, 0: not known
    size_t             free_first = 0;    // before anything was loaded
};

struct pinfer_devices {
    bool                       none = false;  // nothing but the CPU
    std::vector<std::string>   names;         // of each hot shard, as asked for or solved for; empty: the GPUs in order
    std::vector<pinfer_device> used;          // GPUs that are used, and a CPU that has hot neurons
    // for libllama: where the dense layers may lie, NULL at the end; params.devices takes it where `names` is not empty
    std::vector<ggml_backend_dev_t> dense;
};

// Bytes of device memory.
struct pinfer_vram {
    uint64_t used    = 0;  // as the devices report it, as far as they report memory of their own
    uint64_t counted = 0;  // as libllama and the plugin count what they asked for
    uint64_t limit   = 0;  // what may be used
};

// Finds the devices; `list` is what --device says ("" or "none" or names), `hot` and `placed` say whether the shards are used.
bool pinfer_devices_choose(const std::string & list, const pinfer_artefacts & artefacts, bool sparse, pinfer_devices & devices,
                           std::string & err);

// Call it before anything is loaded: notes what is free, and checks that it is as much as the placement takes.
bool pinfer_devices_check(pinfer_devices & devices, const std::string & model_path, std::string & err);

// What is used now; false without a device. `context` may be NULL.
bool pinfer_devices_vram(const pinfer_devices & devices, const struct llama_context * context, pinfer_vram & vram);
