// options.cpp: the runner's own flags, taken out of the command line.
#include "options.h"

#include <cstdlib>
#include <cstring>

namespace {

// A flag that describes the last --pinfer-model. Returns false when there is no such flag.
bool model_flag_set(pinfer_model_options & model, const std::string & name, const char * value, std::string & err) {
    if (name == "activation") {
        model.activation = pinfer_activation_parse(value);
        if (model.activation == PINFER_ACT_GRAPH) {
            err = std::string("--pinfer-activation: unknown activation '") + value + "'";
        }
    } else if (name == "threshold") {
        model.threshold = strtof(value, nullptr);
    } else if (name == "predictor") {
        model.predictor = value;
    } else if (name == "cold") {
        model.cold = value;
    } else if (name == "hot") {
        model.hot.push_back(value);
    } else if (name == "device") {
        const char * bytes = strchr(value, '=');
        model.devices.push_back(bytes ? std::string(value, bytes) : value);
        model.needed.push_back(bytes ? strtoull(bytes + 1, nullptr, 10) : 0);
    } else {
        return false;
    }
    return true;
}

bool flag_set(pinfer_options & options, const std::string & name, const char * value, std::string & err) {
    if (name == "model") {
        options.models.emplace_back();
        options.models.back().path = value;
    } else if (name == "rpc") {
        options.rpc = value;
    } else if (name == "vram") {
        options.vram = strtoull(value, nullptr, 10);
    } else if (options.models.empty() || !model_flag_set(options.models.back(), name, value, err)) {
        err = "unknown flag --pinfer-" + name + ", or no --pinfer-model before it";
    }
    return err.empty();
}

} // namespace

bool pinfer_options_parse(int argc, char ** argv, pinfer_options & options, std::string & err) {
    const char prefix[] = "--pinfer-";
    options.verb        = argc > 1 ? argv[1] : "";
    if (options.verb != "completion" && options.verb != "cli" && options.verb != "server" && options.verb != "flags") {
        err = "usage: pinfer-runner completion|cli|server [--pinfer-... VALUE] [llama.cpp's flags]";
        return false;
    }
    options.rest.push_back(argv[0]);
    for (int i = 2; i < argc; i++) {
        if (strncmp(argv[i], prefix, strlen(prefix)) != 0) {
            options.rest.push_back(argv[i]);
            continue;
        }
        const std::string name = argv[i] + strlen(prefix);
        if (name == "json") {
            options.json = true;
        } else if (i + 1 == argc) {
            err = std::string(argv[i]) + " needs a value";
            return false;
        } else if (!flag_set(options, name, argv[++i], err)) {
            return false;
        }
    }
    options.rest.push_back(nullptr);
    return true;
}
