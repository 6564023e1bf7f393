// session.cpp: from a command line to a context that decodes.
#include "session.h"

#include "interrupt.h"
#include "log.h"
#include "machine.h"
#include "pinfer.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>

namespace {

const struct {
    const char *   name;
    enum ggml_type type;
} cache_types[] = {
    { "f32",  GGML_TYPE_F32  }, { "f16",  GGML_TYPE_F16  }, { "bf16",   GGML_TYPE_BF16   },
    { "q8_0", GGML_TYPE_Q8_0 }, { "q5_1", GGML_TYPE_Q5_1 }, { "q5_0",   GGML_TYPE_Q5_0   },
    { "q4_1", GGML_TYPE_Q4_1 }, { "q4_0", GGML_TYPE_Q4_0 }, { "iq4_nl", GGML_TYPE_IQ4_NL },
};

bool cache_type_parse(const std::string & name, enum ggml_type & type) {
    for (const auto & t : cache_types) {
        if (name == t.name) {
            type = t.type;
            return true;
        }
    }
    return false;
}

// Activation to configure the plugin with; OTHER means that the model runs dense, with the reason in `why`.
bool activation_choose(const pinfer_arguments & args, const pinfer_model_file & file,
                       enum pinfer_activation & activation, std::string & why, std::string & err) {
    if (!args.activation.empty()) {
        activation = args.activation == "other" ? PINFER_ACT_OTHER : pinfer_activation_parse(args.activation.c_str());
        if (activation == PINFER_ACT_GRAPH) {
            err = "--activation wants relu, relu2, reglu, drelu or other, not '" + args.activation + "'";
            return false;
        }
        why = "as --activation other says";
        return true;
    }
    if (!file.activation.empty()) {
        activation = pinfer_activation_parse(file.activation.c_str());
        if (activation == PINFER_ACT_GRAPH) {
            activation = PINFER_ACT_OTHER;
        }
        why = "its pinfer.ffn.activation is " + file.activation;
        return true;
    }
    activation = pinfer_arch_activation(file.arch.c_str());
    why        = "the FFN of a " + file.arch + " model has no exact zeros (is it a ReLU model? --activation names it)";
    return true;
}

// Puts libggml-pinfer.so, which this program is linked with, into the registry that libllama uses.
ggml_backend_reg_t plugin_register(std::string & err) {
    Dl_info info;
    if (!dladdr((const void *) pinfer_configure, &info) || !info.dli_fname) {
        err = "libggml-pinfer.so cannot be found; run `make build`";
        return nullptr;
    }
    pinfer_log_clear();
    pinfer_stderr_catch();
    ggml_backend_reg_t reg  = ggml_backend_load(info.dli_fname);
    const std::string  said = pinfer_stderr_release();
    if (!reg) {
        err = !said.empty() ? said.substr(0, said.find('\n'))
                            : info.dli_fname + (" cannot be loaded (" + pinfer_log_error()) + "); run `make build`";
    } else if (!said.empty()) {
        fputs(said.c_str(), stderr);
    }
    return reg;
}

// The artefacts to use.
bool artefacts_choose(const pinfer_arguments & args, pinfer_session & session, std::string & err) {
    if (args.no_artefacts) {
        return true;
    }
    if (session.file.n_split > 1) {
        session.notes.push_back(session.file.path + " is one of several files: artefacts are not used; merge them");
        return true;
    }
    pinfer_artefacts & a = session.artefacts;
    if (!pinfer_artefacts_find(session.file.path, args.artefacts, a, err)) {
        return false;
    }
    if (args.exact) {
        a.predictor.clear();
    }
    if (args.device == "none") {  // the shards are halves of one thing; without a device the model itself is used
        if (!a.hot.empty()) {
            a.cold.clear();
        }
        a.hot.clear();
    }
    if (a.n_hot > 0 && a.cold.empty() && args.device != "none") {
        session.notes.push_back("the placement is not split yet, nothing runs on the device; run `pinfer split " +
                                session.file.path + "`");
    }
    return true;
}

// The devices to use, with as much free memory as the placement takes.
bool devices_choose(const pinfer_arguments & args, pinfer_session & session, bool sparse, std::string & err) {
    const pinfer_artefacts & a = session.artefacts;
    if (!pinfer_devices_choose(args.device, a, sparse, session.devices, err)) {
        return false;
    }
    if (!a.hot.empty() && session.devices.used.empty()) {
        err = a.hot[0] + " needs a device and libggml has no GPU here; name one with --device, or run `pinfer solve " +
              session.file.path + " --vram 0` and `pinfer split " + session.file.path + "`";
        return false;
    }
    return pinfer_devices_check(session.devices, session.file.path, err);
}

bool plugin_configure(const pinfer_arguments & args, pinfer_session & session, enum pinfer_activation activation,
                      std::string & err) {
    const pinfer_artefacts & a      = session.artefacts;
    struct pinfer_params     params = {};
    const auto path_or_null = [](const std::string & path) { return path.empty() ? nullptr : path.c_str(); };
    const auto pointers     = [](const std::vector<std::string> & texts) {
        std::vector<const char *> out;
        for (const std::string & text : texts) {
            out.push_back(text.c_str());
        }
        out.push_back(nullptr);
        return out;
    };
    const bool any     = !a.predictor.empty() || !a.hot.empty() || !a.cold.empty();
    const auto hot     = pointers(a.hot);
    const auto devices = pointers(session.devices.names);

    params.model_path           = any ? session.file.path.c_str() : nullptr;
    params.predictor_path       = path_or_null(a.predictor);
    params.cold_path            = path_or_null(a.cold);
    params.hot_paths            = hot.data();
    params.devices              = a.hot.empty() || session.devices.names.empty() ? nullptr : devices.data();
    params.activation           = activation;
    params.n_batch_dense        = args.n_batch_dense;
    params.activation_threshold = session.file.threshold;

    char cause[1024] = "";
    if (!pinfer_configure(&params, cause, sizeof(cause))) {
        err = cause[0] ? cause : "the plugin cannot be configured";
        return false;
    }
    session.mode = a.predictor.empty() ? PINFER_MODE_EXACT : PINFER_MODE_PREDICTED;
    return true;
}

bool model_load(const pinfer_arguments & args, pinfer_session & session, ggml_backend_reg_t plugin, std::string & err) {
    struct llama_model_params params = llama_model_default_params();
    const bool                sparse = session.mode != PINFER_MODE_DENSE;
    if (session.devices.none || !session.devices.names.empty() || !session.artefacts.hot.empty()) {
        params.devices = session.devices.dense.data();
    }
    if (args.n_gpu_layers >= 0) {
        params.n_gpu_layers = args.n_gpu_layers;
    } else if (sparse) {
        params.n_gpu_layers = (int32_t) session.artefacts.n_gpu_layers;
    }
    // The plugin works on the FFN where the file is mapped, so a sparse model must be mapped.
    if (args.mlock) {
        params.load_mode = args.no_mmap ? LLAMA_LOAD_MODE_MLOCK : LLAMA_LOAD_MODE_MMAP_MLOCK;
    } else if (args.no_mmap) {
        params.load_mode = LLAMA_LOAD_MODE_NONE;
    } else if (sparse) {
        params.load_mode = LLAMA_LOAD_MODE_MMAP;
    }
    // On layers that lie on a GPU the loader would put the FFN there as well.
    struct llama_model_tensor_buft_override overrides[2] = {};
    if (sparse && params.n_gpu_layers != 0) {
        overrides[0].pattern         = "\\.ffn_(up|gate|down)\\.(weight|bias)";
        overrides[0].buft            = ggml_backend_dev_buffer_type(ggml_backend_reg_dev_get(plugin, 0));
        params.tensor_buft_overrides = overrides;
    }
    pinfer_log_clear();
    session.model = llama_model_load_from_file(session.file.path.c_str(), params);
    if (!session.model) {
        const std::string prefix = "error loading model: ";
        std::string       cause  = pinfer_log_error();
        if (cause.compare(0, prefix.size(), prefix) == 0) {
            cause.erase(0, prefix.size());
        }
        err = session.file.path + ": libllama cannot load it" + (cause.empty() ? "" : " (" + cause + ")") +
              "; -v shows its log";
        return false;
    }
    session.vocab = llama_model_get_vocab(session.model);
    if (llama_model_has_encoder(session.model) || !llama_model_has_decoder(session.model) ||
        llama_model_is_diffusion(session.model)) {
        err = session.file.path + " is a " + session.file.arch + " model, which does not write text token by token";
        return false;
    }
    return true;
}

bool context_create(const pinfer_arguments & args, pinfer_session & session, std::string & err) {
    struct llama_context_params params = llama_context_default_params();
    const int32_t               train  = llama_model_n_ctx_train(session.model);

    if (args.n_ctx >= 0) {
        params.n_ctx = args.n_ctx == 0 ? (uint32_t) train : (uint32_t) args.n_ctx;
    } else if (session.artefacts.n_ctx > 0 && session.mode != PINFER_MODE_DENSE) {
        params.n_ctx = session.artefacts.n_ctx;
    } else {
        params.n_ctx = (uint32_t) std::min(train, 4096);
    }
    const uint32_t n_ctx   = std::max(params.n_ctx, 1u);
    params.n_ctx           = n_ctx;
    params.n_batch         = (uint32_t) args.n_batch;
    params.n_ubatch        = (uint32_t) std::min(args.n_ubatch, args.n_batch);
    params.n_threads       = args.n_threads > 0 ? args.n_threads : pinfer_machine_threads();
    params.n_threads_batch = args.n_threads_batch > 0 ? args.n_threads_batch : params.n_threads;
    const bool no_flash = session.file.arch == "plm";  // its graph in libllama aborts with it
    if (no_flash && args.flash_attn == "on") {
        err = "libllama has no flash attention for " + session.file.arch + " models; leave out -fa";
        return false;
    }
    params.flash_attn_type = args.flash_attn == "on"              ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                           : args.flash_attn == "off" || no_flash ? LLAMA_FLASH_ATTN_TYPE_DISABLED
                                                                  : LLAMA_FLASH_ATTN_TYPE_AUTO;
    params.n_outputs_max   = 1; // of a batch only the last token's logits are looked at
    params.abort_callback  = pinfer_interrupt_abort_callback;
    if (session.mode != PINFER_MODE_DENSE) {
        params.op_offload = false; // copies of CPU layers' weights on a device are in no budget
    }
    if (!cache_type_parse(args.cache_type_k, params.type_k) || !cache_type_parse(args.cache_type_v, params.type_v)) {
        err = "not reached: cache types are checked first";
        return false;
    }
    pinfer_log_clear();
    session.context = llama_init_from_model(session.model, params);
    if (!session.context) {
        const std::string cause = pinfer_log_error();
        err = "no context of " + std::to_string(n_ctx) + " tokens" + (cause.empty() ? "" : " (" + cause + ")") +
              "; try a smaller one with -c";
        return false;
    }
    session.n_ctx = std::min(llama_n_ctx(session.context), n_ctx);  // libllama rounds it up
    return true;
}

// Options that cannot be judged before it is known what the model is. Returns false with a usage error.
bool usage_check(const pinfer_arguments & args, bool sparse, std::string & err) {
    enum ggml_type type;
    for (const std::string & name : { args.cache_type_k, args.cache_type_v }) {
        if (!cache_type_parse(name, type)) {
            err = "unknown KV cache type '" + name + "'; use f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0 or iq4_nl";
        }
    }
    if (sparse && args.no_mmap) {
        err = "--no-mmap works only with --dense: pinfer computes the FFN where the file is mapped";
    }
    return err.empty();
}

} // namespace

int pinfer_session_open(const pinfer_arguments & args, pinfer_session & session) {
    std::string & err = session.error;
    if (!pinfer_model_file_open(args.model, session.file, err)) {
        return 1;
    }
    enum pinfer_activation activation = PINFER_ACT_OTHER;
    std::string            why;
    if (!activation_choose(args, session.file, activation, why, err)) {
        return 2;
    }
    const bool sparse = !args.dense && activation != PINFER_ACT_OTHER;
    if (!usage_check(args, sparse, err)) {
        return 2;
    }
    if (!args.dense && !sparse) {
        session.notes.push_back("running dense: " + why);
    } else if (args.dense && activation != PINFER_ACT_OTHER &&
               (pinfer_arch_activation(session.file.arch.c_str()) != activation || session.file.threshold > 0.0f)) {
        session.notes.push_back(std::string("stock libllama does not know that this model's FFN is ") +
                                pinfer_activation_name(activation) + ", its text will be wrong; leave out --dense");
    }
    llama_backend_init();
    ggml_backend_reg_t plugin = nullptr;
    if (sparse) {
        plugin = plugin_register(err);
        if (!plugin || !artefacts_choose(args, session, err)) {
            return 1;
        }
    }
    // the devices are asked for their free memory before the hot neurons go there
    if (!devices_choose(args, session, sparse, err) || (sparse && !plugin_configure(args, session, activation, err))) {
        return 1;
    }
    if (!model_load(args, session, plugin, err) || !context_create(args, session, err)) {
        return 1;
    }
    pinfer_session_vram(session, session.vram_loaded);
    for (const std::string & note : session.notes) {  // not before: an error should stand alone
        pinfer_say_note(note);
    }
    return 0;
}

void pinfer_session_close(pinfer_session & session) {
    llama_free(session.context);
    llama_model_free(session.model);
    session.context = nullptr;
    session.model   = nullptr;
    llama_backend_free();
}

bool pinfer_session_tokenize(const pinfer_session & session, const std::string & text, bool add_special,
                             std::vector<llama_token> & tokens) {
    tokens.resize(text.size() + 2);  // a token has at least one byte, but for BOS and EOS
    int32_t n = llama_tokenize(session.vocab, text.data(), (int32_t) text.size(), tokens.data(),
                               (int32_t) tokens.size(), add_special, true);
    if (n < 0 && n != INT32_MIN) {
        tokens.resize((size_t) -n);
        n = llama_tokenize(session.vocab, text.data(), (int32_t) text.size(), tokens.data(), (int32_t) tokens.size(),
                           add_special, true);
    }
    if (n < 0) {
        tokens.clear();
        return false;
    }
    tokens.resize((size_t) n);
    // A chat template may write BOS itself.
    if (add_special && n >= 2 && tokens[0] == llama_vocab_bos(session.vocab) && tokens[1] == tokens[0]) {
        tokens.erase(tokens.begin());
    }
    return true;
}

std::string pinfer_session_piece(const pinfer_session & session, llama_token token) {
    std::string piece(32, '\0');
    int32_t     n = llama_token_to_piece(session.vocab, token, piece.data(), (int32_t) piece.size(), 0, false);
    if (n < 0) {
        piece.resize((size_t) -n);
        n = llama_token_to_piece(session.vocab, token, piece.data(), (int32_t) piece.size(), 0, false);
    }
    piece.resize(n > 0 ? (size_t) n : 0);
    return piece;
}

bool pinfer_session_has_token(const pinfer_session & session, const char * text) {
    std::vector<llama_token> tokens;
    return pinfer_session_tokenize(session, text, false, tokens) && tokens.size() == 1 &&
           llama_vocab_is_control(session.vocab, tokens[0]);
}

static double seconds(void) {
    return (double) ggml_time_us() * 1e-6;
}

// Appends n tokens in one batch, with the logits of the last.
static enum pinfer_decode_result decode(pinfer_session & session, const llama_token * tokens, size_t n) {
    if (session.tokens.size() + n > session.n_ctx) {
        return PINFER_DECODE_FULL;
    }
    std::vector<llama_token> batch(tokens, tokens + n);  // libllama wants them writable
    pinfer_log_clear();
    const int32_t status = llama_decode(session.context, llama_batch_get_one(batch.data(), (int32_t) n));
    if (status == 0) {
        llama_synchronize(session.context);
        session.tokens.insert(session.tokens.end(), tokens, tokens + n);
        return PINFER_DECODE_OK;
    }
    // what a part of the batch left behind is taken out again
    if (!llama_memory_seq_rm(llama_get_memory(session.context), 0, (llama_pos) session.tokens.size(), -1)) {
        llama_memory_clear(llama_get_memory(session.context), true);
        session.tokens.clear();
    }
    if (status == 2 || pinfer_interrupted()) {
        return PINFER_DECODE_INTERRUPTED;
    }
    if (status == 1) {
        return PINFER_DECODE_FULL;
    }
    char device[512] = "";
    if (session.mode != PINFER_MODE_DENSE && pinfer_last_failure(device, sizeof(device))) {
        session.error = std::string(device) + "; see that it still works, or do without it: --device none";
        return PINFER_DECODE_FAILED;
    }
    const std::string cause = pinfer_log_error();
    session.error = "decoding failed" + (cause.empty() ? "" : " (" + cause + ")") + "; -v shows libllama's log";
    return PINFER_DECODE_FAILED;
}

size_t pinfer_session_common(const pinfer_session & session, const std::vector<llama_token> & prompt) {
    size_t n = 0;
    while (n < prompt.size() && n < session.tokens.size() && prompt[n] == session.tokens[n]) {
        n++;
    }
    return n;
}

enum pinfer_decode_result pinfer_session_sync(pinfer_session & session, const std::vector<llama_token> & prompt) {
    size_t keep = pinfer_session_common(session, prompt);
    if (keep == prompt.size() && keep > 0) {
        keep--;  // the last token's logits are needed
    }
    if (keep < session.tokens.size()) {
        if (!llama_memory_seq_rm(llama_get_memory(session.context), 0, (llama_pos) keep, -1)) {
            llama_memory_clear(llama_get_memory(session.context), true);  // recurrent models cannot go back
            keep = 0;
        }
        session.tokens.resize(keep);
    }
    const size_t n_batch = llama_n_batch(session.context);
    while (keep < prompt.size()) {
        if (pinfer_interrupted()) {
            return PINFER_DECODE_INTERRUPTED;
        }
        const size_t n     = std::min(n_batch, prompt.size() - keep);
        const double start = seconds();
        const enum pinfer_decode_result result = decode(session, prompt.data() + keep, n);
        if (result != PINFER_DECODE_OK) {
            return result;
        }
        session.t_prompt += seconds() - start;
        session.n_prompt += n;
        keep += n;
    }
    return PINFER_DECODE_OK;
}

enum pinfer_decode_result pinfer_session_append(pinfer_session & session, llama_token token) {
    const double                    start  = seconds();
    const enum pinfer_decode_result result = decode(session, &token, 1);
    if (result == PINFER_DECODE_OK) {
        session.t_generated += seconds() - start;
        session.n_generated++;
    }
    return result;
}

bool pinfer_session_vram(const pinfer_session & session, pinfer_vram & vram) {
    if (!pinfer_devices_vram(session.devices, session.context, vram)) {
        return false;
    }
    if (session.artefacts.vram > 0 && session.mode != PINFER_MODE_DENSE) {
        vram.limit = session.artefacts.vram;
    }
    return true;
}
