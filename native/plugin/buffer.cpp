// buffer.cpp: buffers, and how they know their model: by the file that is mapped where they lie, or by the file that libllama
// has open while it loads.
#include "buffer.h"

#include "artefact.h"
#include "automatic.h"
#include "ggml-backend-impl.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <new>
#include <sys/stat.h>
#include <sys/sysmacros.h>

static const size_t BUFFER_ALIGN = 64;

namespace {

struct buffer_memory {
    void *                        data = nullptr;
    bool                          owned = false;
    bool                          mapped = false; // a file: its pages can be given back
    std::shared_ptr<pinfer_model> model;          // null: not of a model that is configured
    bool                          held = false;

    buffer_memory() = default;
    buffer_memory(const buffer_memory &) = delete;
    buffer_memory & operator=(const buffer_memory &) = delete;

    ~buffer_memory() {
        if (owned) {
            free(data);
        }
        if (held) {
            pinfer_model_let_go(model.get());
        }
    }
};

// The model that this thread was asked about last while it loaded, and where its file was open.
struct load_in_progress {
    std::weak_ptr<pinfer_model> model;
    int                         fd = -1;
};

thread_local load_in_progress last_load;

// Whether a file of the model is open as fd.
bool is_open_as(int fd, const std::shared_ptr<pinfer_model> & m) {
    pinfer_file_id id;
    return pinfer_loaders_file(fd, &id) && pinfer_model_of(id) == m;
}

bool has_tensor(const pinfer_model & m, const ggml_tensor * t) {
    int               ffn  = -1;
    const pinfer_part part = pinfer_part_of(t->name, false, &ffn);
    if (part != PINFER_PART_NONE) {
        return (size_t) ffn < m.header.ffns.size() && m.header.ffns[(size_t) ffn].part(part).is(t);
    }
    if (pinfer_part_of(t->name, true, &ffn) == PINFER_PART_NONE) {
        return m.header.token_embd.is(t);
    }
    return (size_t) ffn < m.header.ffns.size();
}

// Of the configured models whose file this process has open, one with such a tensor: that which was configured last.
std::shared_ptr<pinfer_model> model_being_loaded(const ggml_tensor * weight) {
    load_in_progress              found;
    std::shared_ptr<pinfer_model> model;
    bool                          known  = false; // also where the model is left to llama.cpp
    DIR * const                   folder = opendir("/proc/self/fd");
    for (const dirent * entry = folder ? readdir(folder) : nullptr; entry; entry = readdir(folder)) {
        const int      fd = atoi(entry->d_name);
        pinfer_file_id id;
        if (entry->d_name[0] == '.' || !pinfer_loaders_file(fd, &id)) {
            continue;
        }
        const auto m = pinfer_automatic_on() ? pinfer_automatic_recognise(fd, id) : pinfer_model_of(id);
        known |= m != nullptr;
        if (m && (!model || m->order > model->order) && has_tensor(*m, weight)) {
            found = {m, fd};
            model = m;
        }
    }
    if (folder) {
        closedir(folder);
    }
    last_load = found;
    if (!known) { // loaded without weights: its graphs are laid out, but never computed
        for (const auto & m : pinfer_models()) {
            if ((!model || m->order > model->order) && has_tensor(*m, weight)) {
                model = m;
            }
        }
    }
    return model;
}

// Of the models that place experts, one with such a stack and some of its experts on a device: that which was configured last.
std::shared_ptr<pinfer_model> model_with_hot_experts(const ggml_tensor * weight) {
    std::shared_ptr<pinfer_model> model;
    for (const auto & m : pinfer_models()) {
        int ffn = -1;
        if (m->places_experts() && has_tensor(*m, weight) && pinfer_part_of(weight->name, false, &ffn) != PINFER_PART_NONE &&
            m->is_hot((size_t) ffn) && (!model || m->order > model->order)) {
            model = m;
        }
    }
    return model;
}

// A mapping of a file, shared as those of models are.
struct mapping {
    uintptr_t      begin = 0, end = 0;
    pinfer_file_id file;
};

// The file that is mapped at this address. The path leads to it, since file systems in layers show other numbers there than
// stat() does.
bool mapping_at(const void * data, mapping * out) {
    FILE * const maps = fopen("/proc/self/maps", "re");
    char *       line = nullptr;
    size_t       room = 0;
    bool         ok   = false;
    while (maps && getline(&line, &room, maps) > 0) {
        uintptr_t begin = 0, end = 0;
        char      mode[5] = "";
        unsigned  major_number = 0, minor_number = 0;
        uint64_t  inode = 0;
        int       path  = 0;
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %*x %x:%x %" SCNu64 " %n", &begin, &end, mode, &major_number, &minor_number,
                   &inode, &path) < 6 || (uintptr_t) data < begin || (uintptr_t) data >= end) {
            continue;
        }
        line[strcspn(line, "\n")] = '\0';
        *out                      = {begin, end, {makedev(major_number, minor_number), (ino_t) inode}};
        pinfer_file_id_of(line + path, &out->file);
        ok = inode != 0 && mode[3] == 's';
        break;
    }
    free(line);
    if (maps) {
        fclose(maps);
    }
    return ok;
}

// Whether all these bytes are mapped from one file.
bool mapped_file(const void * data, size_t size, pinfer_file_id * file) {
    const uintptr_t end = (uintptr_t) data + size;
    mapping         m;
    if (!mapping_at(data, &m)) {
        return false;
    }
    *file = m.file;
    while (m.end < end) {
        if (!mapping_at((const void *) m.end, &m) || m.file != *file) {
            return false;
        }
    }
    return true;
}

buffer_memory * memory_of(ggml_backend_buffer_t buffer) {
    return (buffer_memory *) buffer->context;
}

// --- the interface ----------------------------------------------------------------------------------------------------

void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return memory_of(buffer)->data;
}

void buffer_free(ggml_backend_buffer_t buffer) {
    delete memory_of(buffer);
}

ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t) {
    if (memory_of(buffer)->held) {
        pinfer_model_place(memory_of(buffer)->model.get(), t);
    }
    return GGML_STATUS_SUCCESS;
}

void buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}

void buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
}

void buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
}

bool buffer_cpy_tensor(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    if (!ggml_backend_buffer_is_host(src->buffer)) {
        return false;
    }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(buffer_get_base(buffer), value, buffer->size);
}

const ggml_backend_buffer_i buffer_interface = {
    .free_buffer   = buffer_free,
    .get_base      = buffer_get_base,
    .init_tensor   = buffer_init_tensor,
    .memset_tensor = buffer_memset_tensor,
    .set_tensor    = buffer_set_tensor,
    .get_tensor    = buffer_get_tensor,
    .set_tensor_2d = nullptr,
    .get_tensor_2d = nullptr,
    .cpy_tensor    = buffer_cpy_tensor,
    .clear         = buffer_clear,
    .reset         = nullptr,
};

ggml_backend_buffer_t make_buffer(ggml_backend_buffer_type_t buft, std::unique_ptr<buffer_memory> memory, size_t size) {
    if (memory->model) {
        pinfer_model_hold(memory->model.get());
        memory->held = true;
    }
    return ggml_backend_buffer_init(buft, buffer_interface, memory.release(), size);
}

const char * buft_get_name(ggml_backend_buffer_type_t) {
    return "PINFER";
}

ggml_backend_buffer_t buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) try {
    auto memory   = std::make_unique<buffer_memory>();
    memory->data  = aligned_alloc(BUFFER_ALIGN, (size + BUFFER_ALIGN - 1) / BUFFER_ALIGN * BUFFER_ALIGN);
    memory->owned = true;
    if (!memory->data) {
        return nullptr;
    }
    // weights that are read instead of mapped go here while their file is still open
    const auto loading = last_load.model.lock();
    if (loading && is_open_as(last_load.fd, loading)) {
        memory->model = loading;
        if (!pinfer_automatic_open(loading.get())) {
            return nullptr;
        }
    }
    return make_buffer(buft, std::move(memory), size);
} catch (const std::bad_alloc &) {
    return nullptr;
}

size_t buft_get_alignment(ggml_backend_buffer_type_t) {
    return BUFFER_ALIGN;
}

bool buft_is_host(ggml_backend_buffer_type_t) {
    return true;
}

} // namespace

ggml_backend_buffer_type_t pinfer_buffer_type(ggml_backend_dev_t device) {
    static ggml_backend_buffer_type type = {
        .iface = {
            .get_name       = buft_get_name,
            .alloc_buffer   = buft_alloc_buffer,
            .get_alignment  = buft_get_alignment,
            .get_max_size   = nullptr,
            .get_alloc_size = nullptr,
            .is_host        = buft_is_host,
        },
        .device  = device,
        .context = nullptr,
    };
    return &type;
}

ggml_backend_buffer_t pinfer_buffer_from_host(ggml_backend_dev_t device, void * data, size_t size) try {
    pinfer_file_id file;
    auto           memory = std::make_unique<buffer_memory>();
    memory->data          = data;
    memory->mapped        = mapped_file(data, size, &file);
    if (memory->mapped) {
        memory->model = pinfer_model_of(file);
    }
    if (memory->model && !pinfer_automatic_open(memory->model.get())) {
        return nullptr;
    }
    return make_buffer(pinfer_buffer_type(device), std::move(memory), size);
} catch (const std::bad_alloc &) {
    return nullptr;
}

static buffer_memory * memory_of_weight(const ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    return buffer && buffer->iface.free_buffer == buffer_free ? memory_of(buffer) : nullptr;
}

std::shared_ptr<pinfer_model> pinfer_model_of_weight(const ggml_tensor * weight) {
    const ggml_backend_buffer_t buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    if (const buffer_memory * memory = memory_of_weight(weight)) {
        return memory->model;
    }
    // ggml makes empty buffers by itself: for the probes of libllama's loader, and for a model that is loaded without weights
    const bool empty = !buffer || buffer->buft->iface.get_name == buft_get_name;
    return empty ? model_being_loaded(weight) : model_with_hot_experts(weight);
}

bool pinfer_weight_is_elsewhere(const ggml_tensor * weight) {
    static ggml_backend_dev_t const cpu    = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const ggml_backend_buffer_t     buffer = weight->view_src ? weight->view_src->buffer : weight->buffer;
    return buffer && buffer->buft->iface.get_name != buft_get_name && cpu && ggml_backend_dev_supports_buft(cpu, buffer->buft);
}

std::shared_ptr<pinfer_model> pinfer_model_mapped_at(const void * data) {
    mapping m;
    return data && mapping_at(data, &m) ? pinfer_model_of(m.file) : nullptr;
}

void pinfer_weight_release_pages(const ggml_tensor * weight) {
    const buffer_memory * const memory = memory_of_weight(weight);
    if (memory && memory->mapped) {
        pinfer_artefact_release(weight->data, ggml_nbytes(weight));
    }
}
