// plugin_setup.cpp: every call by which the plugin learns what to compute.
#include "plugin_setup.h"

#include "pinfer_remote.h"

extern "C" ggml_backend_reg_t ggml_backend_init(void);  // libggml-pinfer.so, which this program is linked with

namespace {

ggml_backend_reg_t plugin = nullptr;

// Whether each hot device exists and has the memory free that the placement takes.
bool devices_check(const pinfer_model_options & model, std::string & err) {
    const auto solve_again = [&model](const std::string & vram) {
        return ", or run `pinfer solve " + model.path + " --vram " + vram + "` and `pinfer split " + model.path + "`";
    };
    for (size_t i = 0; i < model.devices.size(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_by_name(model.devices[i].c_str());
        if (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            err = "there is no device " + model.devices[i] + "; name another with --hot-device (";
            for (size_t d = 0; d < ggml_backend_dev_count(); d++) {
                if (ggml_backend_dev_type(ggml_backend_dev_get(d)) != GGML_BACKEND_DEVICE_TYPE_ACCEL) {
                    err += std::string(ggml_backend_dev_name(ggml_backend_dev_get(d))) + ", ";
                }
            }
            err += "none)" + solve_again("0");
            return false;
        }
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(dev, &free, &total);
        if (free < model.needed[i]) {
            err = "device " + model.devices[i] + " has " + std::to_string(free >> 20) + " MiB of memory free, the placement takes " +
                  std::to_string(model.needed[i] >> 20) + " MiB; end what else uses it" + solve_again(std::to_string(free >> 20) + "M");
            return false;
        }
    }
    return true;
}

// The texts as a list that ends with NULL.
std::vector<const char *> pointers(const std::vector<std::string> & texts) {
    std::vector<const char *> list;
    for (const std::string & text : texts) {
        list.push_back(text.c_str());
    }
    list.push_back(nullptr);
    return list;
}

bool model_configure(const pinfer_model_options & model, std::string & err) {
    const auto path    = [](const std::string & text) { return text.empty() ? nullptr : text.c_str(); };
    const auto hot     = pointers(model.hot);
    const auto devices = pointers(model.devices);
    char       cause[1024] = "";

    struct pinfer_params params = {};
    params.model_path           = model.path.c_str();
    params.predictor_path       = path(model.predictor);
    params.cold_path            = path(model.cold);
    params.hot_paths            = model.hot.empty() ? nullptr : hot.data();
    params.devices              = model.hot.empty() || model.devices.empty() ? nullptr : devices.data();
    params.activation           = model.activation;
    params.activation_threshold = model.threshold;
    if (!pinfer_configure(&params, cause, sizeof(cause))) {
        err = cause;
        return false;
    }
    return true;
}

} // namespace

bool pinfer_plugin_setup(const pinfer_options & options, std::string & err) {
    char cause[512];
    if (!options.rpc.empty() && !pinfer_remote_add(options.rpc.c_str(), cause, sizeof(cause))) {
        err = cause;
        return false;
    }
    if (!options.models.empty()) {
        plugin = ggml_backend_init();
        if (!plugin) {
            err = "libggml-pinfer.so is of another version of ggml; run `make build`";
            return false;
        }
        ggml_backend_register(plugin);
    }
    for (const pinfer_model_options & model : options.models) {
        if (!devices_check(model, err) || !model_configure(model, err)) {
            return false;
        }
    }
    return true;
}

llama_model_tensor_buft_override pinfer_plugin_override(const pinfer_model_options & model) {
    if (model.activation == PINFER_ACT_OTHER) {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        return { "\\.ffn_(up|gate|down)_exps\\.(weight|bias)", ggml_backend_dev_buffer_type(cpu) };
    }
    return { "\\.(ffn_(up|gate|down)(_exps|_shexp)?|channel_mix_(key|value))\\.(weight|bias)",
             ggml_backend_dev_buffer_type(ggml_backend_reg_dev_get(plugin, 0)) };
}
