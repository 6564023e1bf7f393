// devices.cpp: which devices a run uses, and the memory it takes of them.
#include "devices.h"

#include "pinfer.h"

#include <algorithm>
#include <cstring>
#include <map>

// libllama exports this function and no installed header declares it. Weak: another libllama may come without it.
struct llama_memory_breakdown_data {
    size_t model;
    size_t context;
    size_t compute;
};
LLAMA_API __attribute__((weak)) std::map<ggml_backend_buffer_type_t, llama_memory_breakdown_data>
llama_get_memory_breakdown(const struct llama_context * context);

namespace {

bool is_gpu(ggml_backend_dev_t device) {
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

std::vector<ggml_backend_dev_t> gpus_all(void) {
    std::vector<ggml_backend_dev_t> gpus;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        if (is_gpu(ggml_backend_dev_get(i))) {
            gpus.push_back(ggml_backend_dev_get(i));
        }
    }
    return gpus;
}

// Whether free memory is memory of the device: a CPU shares the machine's, and what lies behind RPC may be one.
bool reports_its_own(ggml_backend_dev_t device) {
    return is_gpu(device) && strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "RPC") != 0;
}

pinfer_device & device_use(pinfer_devices & devices, ggml_backend_dev_t device) {
    for (pinfer_device & known : devices.used) {
        if (known.device == device) {
            return known;
        }
    }
    devices.used.emplace_back();
    devices.used.back().device = device;
    return devices.used.back();
}

bool names_resolve(const pinfer_devices & devices, std::vector<ggml_backend_dev_t> & found, std::string & err) {
    for (const std::string & name : devices.names) {
        found.push_back(ggml_backend_dev_by_name(name.c_str()));
        if (found.back() && ggml_backend_dev_type(found.back()) != GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            continue;
        }
        err = "there is no device " + name + "; devices are:";
        for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
            if (ggml_backend_dev_type(ggml_backend_dev_get(i)) != GGML_BACKEND_DEVICE_TYPE_ACCEL) {
                err += std::string(" ") + ggml_backend_dev_name(ggml_backend_dev_get(i));
            }
        }
        return false;
    }
    return true;
}

// Bytes that libllama's buffers and the hot shards take of a device.
uint64_t bytes_counted(const pinfer_device & d, const struct llama_context * context) {
    uint64_t bytes = 0;
    for (const int shard : d.hot) {
        bytes += pinfer_hot_shard_bytes(shard);
    }
    if (context && llama_get_memory_breakdown) {
        for (const auto & [type, data] : llama_get_memory_breakdown(context)) {
            if (ggml_backend_buft_get_device(type) == d.device && !ggml_backend_buft_is_host(type)) {
                bytes += data.model + data.context + data.compute;
            }
        }
    }
    return bytes;
}

std::string mib(uint64_t bytes) {
    return std::to_string(bytes >> 20) + " MiB";
}

} // namespace

bool pinfer_devices_choose(const std::string & list, const pinfer_artefacts & artefacts, bool sparse, pinfer_devices & devices,
                           std::string & err) {
    const size_t n_hot = sparse ? artefacts.hot.size() : 0;
    devices            = {};
    devices.none       = list == "none";
    if (devices.none) {
        return true;
    }
    devices.names = pinfer_list_split(list);
    if (devices.names.empty() && sparse && (n_hot > 0 || artefacts.n_gpu_layers > 0) &&
        std::all_of(artefacts.devices.begin(), artefacts.devices.end(),
                    [](const std::string & name) { return ggml_backend_dev_by_name(name.c_str()); })) {
        devices.names = artefacts.devices;
    }
    std::vector<ggml_backend_dev_t> found;
    if (!names_resolve(devices, found, err)) {
        return false;
    }
    if (devices.names.empty()) {
        found = gpus_all();
        if (n_hot > 0) {
            found.resize(std::min(found.size(), n_hot));
        }
    }
    const bool placed = sparse && found.size() == artefacts.needed.size();
    for (size_t i = 0; i < found.size(); i++) {
        if (i < n_hot) {
            device_use(devices, found[i]).hot.push_back((int) i);
        }
        if (is_gpu(found[i])) {
            device_use(devices, found[i]).needed += placed ? artefacts.needed[i] : 0;
            if (n_hot == 0 || devices.dense.empty()) { // beside hot neurons the dense layers lie on one device
                devices.dense.push_back(found[i]);
            }
        }
    }
    devices.dense.push_back(nullptr);
    return true;
}

bool pinfer_devices_check(pinfer_devices & devices, const std::string & model_path, std::string & err) {
    for (pinfer_device & d : devices.used) {
        size_t total = 0;
        ggml_backend_dev_memory(d.device, &d.free_first, &total);
        if (d.free_first < d.needed) {
            err = std::string("device ") + ggml_backend_dev_name(d.device) + " has " + mib(d.free_first) +
                  " of memory free, the placement takes " + mib(d.needed) + "; end what else uses it, or run `pinfer solve " +
                  model_path + " --vram " + std::to_string(d.free_first >> 20) + "M` and `pinfer split " + model_path + "`";
            return false;
        }
    }
    return true;
}

bool pinfer_devices_vram(const pinfer_devices & devices, const struct llama_context * context, pinfer_vram & vram) {
    vram = {};
    for (const pinfer_device & d : devices.used) {
        const uint64_t counted = bytes_counted(d, context);
        size_t         free = 0, total = 0;
        ggml_backend_dev_memory(d.device, &free, &total);
        const uint64_t reported = reports_its_own(d.device) && d.free_first > free ? d.free_first - free : 0;
        // a report that has not moved by what is known to lie there is one of other memory
        vram.used += std::max(reported, counted);
        vram.counted += counted;
        vram.limit += total;
    }
    return !devices.used.empty();
}
