// main.cpp: pinfer-runner, a command line around libllama with pinfer's plugin.
#include "arguments.h"
#include "chat.h"
#include "generate.h"
#include "interrupt.h"
#include "log.h"
#include "remote.h"
#include "report.h"
#include "sampling.h"
#include "session.h"
#include "text.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>

namespace {

const int exit_interrupted = 130;
const int exit_closed_pipe = 141;  // as the shell reports a program that dies of SIGPIPE

struct run {
    pinfer_arguments args;
    pinfer_session   session;
    std::string      prompt;
    std::string      grammar;
    uint32_t         seed = 0;
};

bool texts_read(run & r, std::string & err) {
    if (!r.args.prompt_file.empty()) {
        if (!pinfer_file_read(r.args.prompt_file, r.prompt, err)) {
            return false;
        }
        if (!r.prompt.empty() && r.prompt.back() == '\n') {
            r.prompt.pop_back();
        }
    } else {
        r.prompt = r.args.escape ? pinfer_unescape(r.args.prompt) : r.args.prompt;
    }
    r.grammar = r.args.grammar;
    return r.args.grammar_file.empty() || pinfer_file_read(r.args.grammar_file, r.grammar, err);
}

bool prompt_tokenize(run & r, std::vector<llama_token> & tokens, std::string & err) {
    if (!pinfer_session_tokenize(r.session, r.prompt, true, tokens)) {
        err = "the prompt cannot be tokenised";
        return false;
    }
    const llama_token bos = llama_vocab_bos(r.session.vocab);
    if (tokens.empty() && bos != LLAMA_TOKEN_NULL) {
        tokens.push_back(bos);
    }
    if (tokens.empty()) {
        err = "the prompt is empty and this model has no token to begin with; give one with -p";
        return false;
    }
    if (tokens.size() > r.session.n_ctx) {
        err = "the prompt has " + std::to_string(tokens.size()) + " tokens, the context " +
              std::to_string(r.session.n_ctx) + "; -c makes a larger one";
        return false;
    }
    return true;
}

// The end of the run on stdout: the JSON object, or a line break after the text.
bool output_finish(const run & r, const std::vector<llama_token> & tokens, const pinfer_answer & answer) {
    if (r.args.json) {
        return pinfer_stdout_write(pinfer_report_json(r.session, r.prompt, tokens, answer, r.seed));
    }
    const std::string shown = (r.args.no_display_prompt ? "" : r.prompt) + answer.text;
    return shown.empty() || shown.back() == '\n' || pinfer_stdout_write("\n");
}

int prompt_run(run & r) {
    std::vector<llama_token> tokens;
    std::string              err;
    pinfer_sampler           sampler;
    if (!prompt_tokenize(r, tokens, err) ||
        !pinfer_sampler_create(r.args, r.grammar, r.seed, r.session, sampler, err)) {
        pinfer_say_error(err);
        return 1;
    }
    pinfer_answer answer;
    pinfer_interrupt_stage(PINFER_STAGE_GENERATING);
    if (r.args.json || r.args.no_display_prompt || pinfer_stdout_write(r.prompt)) {
        pinfer_generate(r.session, sampler, tokens, r.args.n_predict, !r.args.json, answer);
    } else {
        answer.stop  = errno == EPIPE ? PINFER_STOP_CLOSED : PINFER_STOP_FAILED;
        answer.error = std::string("cannot write to stdout: ") + strerror(errno);
    }
    pinfer_sampler_free(sampler);

    if (answer.stop != PINFER_STOP_CLOSED && answer.stop != PINFER_STOP_FAILED && !output_finish(r, tokens, answer)) {
        answer.stop  = errno == EPIPE ? PINFER_STOP_CLOSED : PINFER_STOP_FAILED;
        answer.error = std::string("cannot write to stdout: ") + strerror(errno);
    }
    switch (answer.stop) {
        case PINFER_STOP_FAILED:
            if (!r.args.json && !answer.text.empty()) {
                pinfer_stdout_write("\n");
            }
            pinfer_say_error(answer.error);
            return 1;
        case PINFER_STOP_CLOSED:
            return exit_closed_pipe;
        case PINFER_STOP_INTERRUPT:
            return exit_interrupted;
        case PINFER_STOP_CONTEXT:
            pinfer_say_note("the context of " + std::to_string(r.session.n_ctx) +
                            " tokens is full; -c makes a larger one");
            return 0;
        default:
            return 0;
    }
}

int run_all(int argc, char ** argv) {
    run         r;
    std::string err;
    if (!pinfer_arguments_parse(argc, argv, r.args, err)) {
        pinfer_say_error(err);
        return 2;
    }
    if (r.args.help) {
        return pinfer_stdout_write(pinfer_arguments_help()) ? 0 : 1;
    }
    pinfer_interrupt_install(r.args.model);
    pinfer_log_install(r.args.verbose);
    if (!texts_read(r, err) || !pinfer_remote_open(r.args, err)) {
        pinfer_say_error(err);
        return 1;
    }
    int code = pinfer_session_open(r.args, r.session);
    if (code != 0) {
        pinfer_say_error(r.session.error);
        pinfer_session_close(r.session);
        return code;
    }
    r.seed = pinfer_seed_choose(r.args.seed);
    if (r.args.conversation || (!r.args.has_prompt && !r.args.no_conversation)) {
        code = pinfer_chat(r.args, r.grammar, r.prompt, r.seed, r.session);
    } else {
        code = prompt_run(r);
    }
    if (code == 0 || code == exit_interrupted) {
        const bool        drawn    = r.args.seed < 0 && r.args.temp > 0.0f;
        const std::string line     = pinfer_report_line(r.session, drawn, r.seed);
        const std::string fallback = pinfer_report_fallback(r.session);
        if (!line.empty()) {
            fprintf(stderr, "%s\n", line.c_str());
        }
        if (!fallback.empty()) {
            pinfer_say_note(fallback);
        }
    }
    pinfer_session_close(r.session);
    return code;
}

} // namespace

int main(int argc, char ** argv) {
    try {
        return run_all(argc, argv);
    } catch (const std::bad_alloc &) {
        pinfer_say_error("out of memory; try a smaller context with -c");
    } catch (const std::exception & e) {
        pinfer_say_error(e.what());
    }
    return 1;
}
