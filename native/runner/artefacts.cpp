// artefacts.cpp: the folder of artefacts and the keys of placement.gguf (docs/formats.md).
#include "artefacts.h"

#include "model_file.h"
#include "pinfer.h"

#include <algorithm>
#include <cstdlib>
#include <sys/stat.h>
#include <unistd.h>

namespace {

bool is_folder(const std::string & path) {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

std::string file_in(const std::string & folder, const char * name) {
    const std::string path = folder + "/" + name;
    struct stat       info;
    return stat(path.c_str(), &info) == 0 ? path : "";
}

// Whether a writer would put the folder there (pinfer/artefacts/paths.py decides the same way).
bool can_be_written(const std::string & folder) {
    if (is_folder(folder)) {
        return access(folder.c_str(), W_OK | X_OK) == 0;
    }
    const std::string parent = folder.substr(0, folder.find_last_of('/') + 1);
    return access(folder.c_str(), F_OK) != 0 && access(parent.c_str(), W_OK | X_OK) == 0;
}

std::string pinfer_home(void) {
    const auto        env  = [](const char * name) { const char * v = getenv(name); return std::string(v ? v : ""); };
    const std::string home = env("PINFER_HOME");
    const std::string user = env("HOME");
    if (!home.empty()) {
        return home.compare(0, 2, "~/") == 0 ? user + home.substr(1) : home;
    }
    const std::string data = env("XDG_DATA_HOME");
    return (data.empty() ? user + "/.local/share" : data) + "/pinfer";
}

// Where artefacts may lie in both places, the one a writer would take now holds what was written last.
bool folder_find(const std::string & model_path, std::string & folder, std::string & err) {
    char fingerprint[33];
    char cause[512] = "";
    if (!pinfer_fingerprint(model_path.c_str(), fingerprint, cause, sizeof(cause))) {
        err = cause;
        return false;
    }
    char *            resolved = realpath(model_path.c_str(), nullptr);
    const std::string path     = resolved ? resolved : model_path;
    free(resolved);
    const std::string name   = path.substr(path.find_last_of('/') + 1);
    const std::string beside = path + ".pinfer";
    // In the model hub's shared cache a model is a link to a file that is called by its hash. That cache may be emptied
    // at any time, so that artefacts do not lie there.
    const bool        in_hub = name.size() >= 40 && name.find_first_not_of("0123456789abcdef") == std::string::npos;
    const std::string home   = pinfer_home() + "/" + (in_hub ? "hub" : name) + "-" + std::string(fingerprint, 12);

    const bool          first_is_beside = !in_hub && can_be_written(beside);
    const std::string & first           = first_is_beside ? beside : home;
    const std::string & second          = first_is_beside ? home : beside;
    folder = is_folder(first) ? first : is_folder(second) ? second : "";
    return true;
}

// Values of an array of u32 or u64; none where there is no such key.
std::vector<uint64_t> array_of_uint(const struct gguf_context * gguf, const char * key) {
    const int64_t         id = gguf_find_key(gguf, key);
    std::vector<uint64_t> values;
    if (id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_ARRAY) {
        const enum gguf_type type = gguf_get_arr_type(gguf, id);
        for (size_t i = 0; i < gguf_get_arr_n(gguf, id); i++) {
            if (type == GGUF_TYPE_UINT32) {
                values.push_back(((const uint32_t *) gguf_get_arr_data(gguf, id))[i]);
            } else if (type == GGUF_TYPE_UINT64) {
                values.push_back(((const uint64_t *) gguf_get_arr_data(gguf, id))[i]);
            }
        }
    }
    return values;
}

// What the placement takes of each device, or what it may take.
std::vector<uint64_t> needed_of(const struct gguf_context * gguf, const pinfer_artefacts & artefacts) {
    for (const char * key : { "pinfer.placement.vram_needed", "pinfer.placement.vram_device" }) {
        const std::vector<uint64_t> bytes = array_of_uint(gguf, key);
        if (!bytes.empty() && bytes.size() == artefacts.devices.size()) {
            return bytes;
        }
    }
    return std::vector<uint64_t>(artefacts.devices.size() == 1, artefacts.vram);
}

// Budget, layers and context of the placement; it must be of this model and of this format.
bool placement_read(const std::string & model_path, pinfer_artefacts & artefacts, std::string & err) {
    const std::string     remedy = "run `pinfer solve " + model_path + "` again";
    struct gguf_context * gguf   = pinfer_gguf_open(artefacts.placement, remedy, err);
    if (!gguf) {
        return false;
    }
    char fingerprint[33];
    char cause[512] = "";
    if (!pinfer_fingerprint(model_path.c_str(), fingerprint, cause, sizeof(cause))) {
        err = cause;
    } else if (pinfer_gguf_string(gguf, "pinfer.kind", "") != "placement") {
        err = artefacts.placement + " is not a placement; " + remedy;
    } else if (pinfer_gguf_uint(gguf, "pinfer.format_version", 0) != PINFER_FORMAT_VERSION) {
        err = artefacts.placement + " has another format version than this pinfer; " + remedy;
    } else if (pinfer_gguf_string(gguf, "pinfer.model.fingerprint", "") != fingerprint) {
        err = artefacts.placement + " was made from another model than " + model_path + "; " + remedy;
    } else {
        artefacts.vram         = pinfer_gguf_uint(gguf, "pinfer.placement.vram", 0);
        artefacts.n_gpu_layers = (uint32_t) pinfer_gguf_uint(gguf, "pinfer.placement.n_gpu_layers", 0);
        artefacts.n_ctx        = (uint32_t) pinfer_gguf_uint(gguf, "pinfer.placement.n_ctx", 0);
        artefacts.devices      = pinfer_list_split(pinfer_gguf_string(gguf, "pinfer.placement.device", ""));
        artefacts.needed       = needed_of(gguf, artefacts);
        for (const uint64_t n : array_of_uint(gguf, "pinfer.placement.n_hot")) {
            artefacts.n_hot += n;
        }
    }
    gguf_free(gguf);
    return err.empty();
}

// hot.gguf, hot-1.gguf, ... as far as there are such, unless all are without tensors: a placement for a machine without a
// device leaves them so.
bool hot_find(const std::string & model_path, pinfer_artefacts & artefacts, std::string & err) {
    const std::string remedy = "run `pinfer split " + model_path + "` again";
    int64_t           n      = 0;
    for (std::string path = file_in(artefacts.folder, "hot.gguf"); !path.empty();) {
        struct gguf_context * gguf = pinfer_gguf_open(path, remedy, err);
        if (!gguf) {
            return false;
        }
        n += gguf_get_n_tensors(gguf);
        gguf_free(gguf);
        artefacts.hot.push_back(path);
        path = file_in(artefacts.folder, ("hot-" + std::to_string(artefacts.hot.size()) + ".gguf").c_str());
    }
    if (!artefacts.hot.empty() && artefacts.cold.empty()) {
        err = artefacts.hot[0] + " lies there without its cold.gguf; " + remedy;
        return false;
    }
    if (n == 0) {
        artefacts.hot.clear();
    }
    return true;
}

} // namespace

std::vector<std::string> pinfer_list_split(const std::string & list) {
    std::vector<std::string> parts;
    for (size_t begin = 0; begin < list.size();) {
        const size_t end = std::min(list.find(',', begin), list.size());
        if (end > begin) {
            parts.push_back(list.substr(begin, end - begin));
        }
        begin = end + 1;
    }
    return parts;
}

bool pinfer_artefacts_find(const std::string & model_path, const std::string & folder, pinfer_artefacts & artefacts,
                           std::string & err) {
    artefacts = {};
    if (!folder.empty() && !is_folder(folder)) {
        err = "there is no folder " + folder + "; leave out --artefacts, or run `pinfer profile " + model_path + "`";
        return false;
    }
    artefacts.folder = folder;
    if (folder.empty() && !folder_find(model_path, artefacts.folder, err)) {
        return false;
    }
    if (artefacts.folder.empty()) {
        return true;
    }
    artefacts.predictor = file_in(artefacts.folder, "predictor.gguf");
    artefacts.cold      = file_in(artefacts.folder, "cold.gguf");
    artefacts.placement = file_in(artefacts.folder, "placement.gguf");

    if (!artefacts.placement.empty() && !placement_read(model_path, artefacts, err)) {
        return false;
    }
    return hot_find(model_path, artefacts, err);
}
