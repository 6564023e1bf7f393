// automatic.cpp: which models are taken over, by what their header, the folder beside them and the environment say.
#include "automatic.h"

#include "artefact.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <set>
#include <sys/stat.h>
#include <unistd.h>

namespace {

std::string text_of(const char * name) {
    const char * const value = getenv(name);
    return value ? value : "";
}

std::string name_of(const std::string & path) {
    return path.substr(path.find_last_of('/') + 1);
}

bool is_folder(const std::string & path) {
    struct stat st = {};
    return stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}

void say(const pinfer_model & m, const std::string & what) {
    fprintf(stderr, "pinfer: %s: %s\n", name_of(m.settings.model).c_str(), what.c_str());
}

// The parts of a text between commas.
std::vector<std::string> parts_of(std::string rest) {
    std::vector<std::string> parts;
    while (!rest.empty()) {
        const size_t comma = rest.find(',');
        parts.push_back(rest.substr(0, comma));
        rest.erase(0, comma == std::string::npos ? comma : comma + 1);
    }
    return parts;
}

// --- what the environment says of a model ------------------------------------------------------------------------------

// Whether the other variables are about this model: the one that PINFER_MODEL names, else the first that is loaded.
bool is_named(const pinfer_file_id & id, std::string * err) {
    static bool       first = true;
    const bool        is_first = first;
    const std::string named    = text_of("PINFER_MODEL");
    pinfer_file_id    wanted;
    first = false;
    if (named.empty()) {
        return is_first;
    }
    if (!pinfer_file_id_of(named.c_str(), &wanted)) {
        *err = "PINFER_MODEL=" + named + " is not a file; correct or unset it";
        return false;
    }
    return wanted == id;
}

bool read_rule(pinfer_model * m, bool named, std::string * err) {
    m->settings.rule             = {m->header.activation, m->header.threshold};
    const std::string activation = named ? text_of("PINFER_ACTIVATION") : "";
    const std::string threshold  = named ? text_of("PINFER_ACTIVATION_THRESHOLD") : "";
    if (!activation.empty()) {
        m->settings.rule.act = pinfer_activation_parse(activation.c_str());
        if (m->settings.rule.act == PINFER_ACT_GRAPH) {
            *err = "PINFER_ACTIVATION=" + activation + " is not an activation; it is one of relu, relu2, reglu, drelu, reglu2 and other";
            return false;
        }
    }
    if (!threshold.empty()) {
        char * end = nullptr;
        m->settings.rule.threshold = strtof(threshold.c_str(), &end);
        if (*end != '\0' || !std::isfinite(m->settings.rule.threshold) || m->settings.rule.threshold < 0.0f) {
            *err = "PINFER_ACTIVATION_THRESHOLD=" + threshold + " is not a number of 0 or more";
            return false;
        }
    }
    return true;
}

// --- the folder of its artefacts (pinfer/artefacts/paths.py decides the same way) ----------------------------------------

bool can_be_written(const std::string & folder) {
    if (is_folder(folder)) {
        return access(folder.c_str(), W_OK | X_OK) == 0;
    }
    const std::string parent = folder.substr(0, folder.find_last_of('/') + 1);
    return access(folder.c_str(), F_OK) != 0 && access(parent.c_str(), W_OK | X_OK) == 0;
}

std::string pinfer_home() {
    const std::string home = text_of("PINFER_HOME"), user = text_of("HOME");
    if (!home.empty()) {
        return home.compare(0, 2, "~/") == 0 ? user + home.substr(1) : home;
    }
    const std::string data = text_of("XDG_DATA_HOME");
    return (data.empty() ? user + "/.local/share" : data) + "/pinfer";
}

// Without the number of a part: "m-00001-of-00003.gguf" -> "m.gguf".
std::string without_number(const std::string & path) {
    const size_t length = strlen("-00001-of-00003.gguf");
    int          end    = 0;
    if (path.size() > length && name_of(path).size() > length) {
        const std::string number = path.substr(path.size() - length);
        sscanf(number.c_str(), "-%*5[0-9]-of-%*5[0-9].gguf%n", &end);
    }
    return end == (int) length ? path.substr(0, path.size() - length) + ".gguf" : path;
}

// In the model hub's shared cache a model is called by its hash.
bool is_in_hub_cache(const std::string & path) {
    const std::string name = name_of(path);
    return name.size() >= 40 && name.find_first_not_of("0123456789abcdef") == std::string::npos;
}

// Empty where the model has none.
std::string folder_of(const std::string & file, const std::string & fingerprint) {
    const std::string path   = without_number(file);
    const std::string name   = name_of(path);
    const bool        in_hub = is_in_hub_cache(path); // which may be emptied, so artefacts lie elsewhere
    const std::string beside = path + ".pinfer";
    const std::string home   = pinfer_home() + "/" + (in_hub ? "hub" : name) + "-" + fingerprint.substr(0, 12);
    const bool        first_is_beside = !in_hub && can_be_written(beside);
    for (const std::string & folder : {first_is_beside ? beside : home, first_is_beside ? home : beside}) {
        if (is_folder(folder)) {
            return folder;
        }
    }
    return "";
}

// The devices that a placement was solved for; empty where it names none.
std::string devices_of(const std::string & placement) {
    std::string          devices;
    gguf_context * const gguf = access(placement.c_str(), R_OK) == 0 ? pinfer_gguf_open(placement.c_str()) : nullptr;
    if (gguf) {
        pinfer_gguf_str(gguf, "pinfer.placement.device", &devices);
        gguf_free(gguf);
    }
    return devices == "none" ? "" : devices;
}

bool find_artefacts(pinfer_model * m, bool named, std::string * err) {
    pinfer_settings & s      = m->settings;
    std::string       folder = named ? text_of("PINFER_ARTEFACTS") : "", fingerprint;
    if (!folder.empty() && !is_folder(folder)) {
        *err = "PINFER_ARTEFACTS=" + folder + " is not a folder; correct or unset it";
        return false;
    }
    if (folder.empty()) {
        if (!pinfer_fingerprint_files(m->header.files, &fingerprint, err)) {
            return false;
        }
        folder = folder_of(s.model, fingerprint);
    }
    const auto found = [&](const std::string & name) {
        const std::string path = folder + "/" + name;
        return !folder.empty() && access(path.c_str(), F_OK) == 0 ? path : "";
    };
    s.predictor = found("predictor.gguf");
    s.cold      = found("cold.gguf");
    if (!s.cold.empty()) {
        for (std::string path = found("hot.gguf"); !path.empty(); path = found("hot-" + std::to_string(s.hot.size()) + ".gguf")) {
            s.hot.push_back(path);
        }
        const std::string devices = named ? text_of("PINFER_DEVICE") : "";
        s.devices                 = parts_of(devices.empty() ? devices_of(folder + "/placement.gguf") : devices);
    }
    return true;
}

// --- its parts -----------------------------------------------------------------------------------------------------------

// Whether the file is part i of a model of n parts.
bool is_part(const std::string & path, uint32_t i, uint32_t n) {
    const pinfer_gguf_ptr gguf(pinfer_gguf_open(path.c_str()));
    uint32_t              number = 0, count = 0;
    return gguf && pinfer_gguf_u32(gguf.get(), "split.no", &number) && pinfer_gguf_u32(gguf.get(), "split.count", &count) &&
           number == i && count == n;
}

// The path of the file that is open as fd; empty where that is no GGUF.
std::string path_of_gguf(int fd) {
    char          path[4096], magic[4] = "", link[64];
    struct stat   st = {};
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof(path) - 1);
    const bool    is_gguf = length > 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) &&
                         pread(fd, magic, sizeof(magic), 0) == (ssize_t) sizeof(magic) && memcmp(magic, "GGUF", sizeof(magic)) == 0;
    return is_gguf ? std::string(path, (size_t) length) : "";
}

// The further parts are open too while libllama loads the model, as a rule in their order after the first. Names do not lead to
// them: the path of an open file is that which a link points to, in the model hub's cache one named by its hash.
bool open_parts(int first, uint32_t n, std::vector<std::string> * files, std::string * err) {
    std::set<int> numbers = {first};
    DIR * const   folder  = opendir("/proc/self/fd");
    for (const dirent * entry = folder ? readdir(folder) : nullptr; entry; entry = readdir(folder)) {
        numbers.insert(atoi(entry->d_name));
    }
    if (folder) {
        closedir(folder);
    }
    auto at = numbers.find(first);
    for (size_t n_tried = 0; files->size() < n && n_tried < numbers.size(); n_tried++) {
        at = ++at == numbers.end() ? numbers.begin() : at;
        const std::string path = path_of_gguf(*at);
        if (!path.empty() && is_part(path, (uint32_t) files->size(), n)) {
            files->push_back(path);
            n_tried = 0;
        }
    }
    *err = "not all of its parts are open";
    return files->size() == n;
}

// --- the line ------------------------------------------------------------------------------------------------------------

std::string described(const pinfer_model & m) {
    const pinfer_settings & s    = m.settings;
    std::string             text = std::string("computed by pinfer as ") + pinfer_activation_name(s.rule.act);
    if (s.rule.threshold > 0.0f) {
        char number[32];
        snprintf(number, sizeof(number), " above %g", (double) s.rule.threshold);
        text += number;
    }
    text += s.predictor.empty() ? ", exact" : ", predicted";
    if (!m.header.obstacle.empty()) {
        text += " (llama.cpp computes " + std::to_string(m.header.n_unclaimed) + " of its FFNs: " + m.header.obstacle + ")";
    }
    const std::string & any = s.predictor.empty() ? s.cold : s.predictor;
    if (any.empty()) {
        return text + ", without artefacts; make them with: pinfer prepare " + (is_in_hub_cache(s.model) ? "-hf USER/REPO" : s.model);
    }
    text += std::string(", with ") + (s.predictor.empty() ? "shards" : s.cold.empty() ? "the predictor" : "predictor and shards") +
            " of " + any.substr(0, any.find_last_of('/'));
    std::string devices;
    for (const auto & hot : m.hot) {
        devices += hot->backend ? (devices.empty() ? ", hot neurons on " : ", ") + hot->name : "";
    }
    return text + devices;
}

} // namespace

bool pinfer_automatic_on() {
    static const bool on = [] {
        Dl_info info = {};
        if (!dladdr((const void *) pinfer_configure, &info) || !info.dli_fname) {
            return false;
        }
        const std::string name = name_of(info.dli_fname);
        return text_of("LD_PRELOAD").find(name) != std::string::npos || name_of(text_of("GGML_BACKEND_PATH")) == name;
    }();
    return on;
}

std::shared_ptr<pinfer_model> pinfer_automatic_recognise(int fd, const pinfer_file_id & id) {
    static std::mutex               mutex;
    static std::set<pinfer_file_id> other_files;
    std::lock_guard<std::mutex>     lock(mutex);
    if (const auto known = pinfer_model_of(id)) {
        return known;
    }
    const std::string path = other_files.contains(id) ? "" : path_of_gguf(fd);
    if (path.empty()) {
        return nullptr;
    }
    auto        m = std::make_shared<pinfer_model>();
    std::string ignored;
    bool        all_open = true;
    const auto  find     = [&](uint32_t n, std::vector<std::string> * files, std::string * err) {
        return all_open = open_parts(fd, n, files, err);
    };
    m->id             = id;
    m->settings.model = path;
    if (!pinfer_header_read(path.c_str(), &m->header, &ignored, find) || m->header.token_embd.ne[1] == 0) {
        if (all_open) { // else they may be the next time
            other_files.insert(id); // an adapter, a projector, a further part, ...
        }
        return nullptr;
    }
    m->ffns.resize(m->header.ffns.size());
    m->state             = PINFER_MODEL_RECOGNISED;
    m->released          = true; // with its last buffer it goes, and is recognised again
    m->announce_fallback = true;

    const bool named = is_named(id, &m->refusal);
    if (m->refusal.empty() && read_rule(m.get(), named, &m->refusal) && m->settings.rule.act != PINFER_ACT_OTHER) {
        find_artefacts(m.get(), named, &m->refusal);
    } else if (m->refusal.empty()) {
        say(*m, "left to llama.cpp: its FFN (" + m->header.arch + ") is not of the ReLU family");
    }
    if (!m->refusal.empty()) {
        say(*m, "not loaded: " + m->refusal);
    }
    pinfer_model_add(m);
    return m;
}

bool pinfer_automatic_open(pinfer_model * m) {
    static std::mutex           one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    if (m->state != PINFER_MODEL_RECOGNISED || m->settings.rule.act == PINFER_ACT_OTHER) {
        return m->refusal.empty();
    }
    if (!m->refusal.empty()) {
        return false;
    }
    if (!pinfer_model_open(m, &m->refusal)) {
        say(*m, "not loaded: " + m->refusal);
        return false;
    }
    m->state = PINFER_MODEL_OPEN;
    say(*m, described(*m));
    return true;
}

void pinfer_automatic_say_idle() {
    for (const auto & m : pinfer_models()) {
        if (m->state == PINFER_MODEL_RECOGNISED && m->settings.rule.act != PINFER_ACT_OTHER && m->refusal.empty() && !m->asked &&
            !m->replaces_activation() && !m->asked.exchange(true)) {
            say(*m, "its FFN is computed by llama.cpp, outside the plugin's buffers; to change that pass: -ot '" PINFER_FFN_TENSORS
                    "=PINFER'");
        }
    }
}
