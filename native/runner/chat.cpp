// chat.cpp: turns, the chat template, and the KV cache across turns.
//
// Only new tokens are decoded: the conversation is formatted whole, but as long as it begins with the text that is
// known to lie in the cache, only the rest is tokenised and appended. Where a template rewrites the past, everything is
// tokenised again and the longest common beginning is kept.
#include "chat.h"

#include "generate.h"
#include "interrupt.h"
#include "log.h"
#include "text.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <poll.h>
#include <unistd.h>
#include <vector>

namespace {

// Tokens of an answer when neither the model nor -n ends it and there is no template that could.
const int32_t plain_answer_tokens = 128;

struct message {
    std::string role;
    std::string content;
};

struct chat {
    const pinfer_arguments & args;
    const std::string &      grammar;
    pinfer_session &         session;
    uint32_t                 seed;
    std::string              chat_template;  // empty: plain continuation
    std::vector<message>     messages;
    std::string              known_text;     // the conversation up to the last answer ...
    std::vector<llama_token> known_tokens;   // ... and its tokens
};

enum input_kind { INPUT_LINE, INPUT_END, INPUT_INTERRUPT };

struct input {
    std::string buffer;
    bool        ended = false;
};

// One line of stdin without its line break. Waits on the interrupt pipe as well, so that Ctrl-C is never missed.
enum input_kind line_read(input & in, std::string & line) {
    while (true) {
        const size_t end = in.buffer.find('\n');
        if (end != std::string::npos || (in.ended && !in.buffer.empty())) {
            line = in.buffer.substr(0, end);
            in.buffer.erase(0, end == std::string::npos ? end : end + 1);
            if (!line.empty() && line.back() == '\r') {
                line.pop_back();
            }
            return INPUT_LINE;
        }
        if (in.ended) {
            return INPUT_END;
        }
        struct pollfd fds[2] = { { STDIN_FILENO, POLLIN, 0 }, { pinfer_interrupt_fd(), POLLIN, 0 } };
        const int     n      = poll(fds, 2, -1);
        if (pinfer_interrupted()) {
            return INPUT_INTERRUPT;
        }
        if (n < 0 || fds[0].revents == 0) {
            continue;
        }
        char          bytes[4096];
        const ssize_t got = read(STDIN_FILENO, bytes, sizeof(bytes));
        if (got > 0) {
            in.buffer.append(bytes, (size_t) got);
        } else if (got == 0 || (errno != EINTR && errno != EAGAIN)) {
            in.ended = true;
        }
    }
}

void prompt_show(const char * prompt) {
    if (isatty(STDIN_FILENO)) {
        fputs(prompt, stderr);
        fflush(stderr);
    }
}

// A message: one line, lines joined by a backslash at their end, or everything between """ and """.
enum input_kind message_read(input & in, std::string & text) {
    const std::string quotes = "\"\"\"";
    std::string       line;
    prompt_show("> ");
    enum input_kind kind = line_read(in, line);
    if (kind != INPUT_LINE) {
        return kind;
    }
    text.clear();
    if (line.compare(0, 3, quotes) == 0) {
        line.erase(0, 3);
        while (line.size() < 3 || line.compare(line.size() - 3, 3, quotes) != 0) {
            text += line + "\n";
            prompt_show(". ");
            kind = line_read(in, line);
            if (kind != INPUT_LINE) {
                return kind;  // a block that is never closed is not sent
            }
        }
        text += line.substr(0, line.size() - 3);
        if (!text.empty() && text.front() == '\n') {
            text.erase(0, 1);
        }
        return INPUT_LINE;
    }
    while (!line.empty() && line.back() == '\\') {
        text += line.substr(0, line.size() - 1) + "\n";
        prompt_show(". ");
        kind = line_read(in, line);
        if (kind == INPUT_INTERRUPT) {
            return kind;
        }
        if (kind == INPUT_END) {
            return INPUT_LINE;
        }
    }
    text += line;
    return INPUT_LINE;
}

// The conversation as the model should see it. False when the template does not take it.
bool conversation_format(const chat & c, const std::vector<message> & messages, std::string & out) {
    out.clear();
    if (c.chat_template.empty()) {
        for (const message & m : messages) {  // every line of the user begins on a line of its own
            const bool begins = m.role == "user" && !out.empty() && out.back() != '\n';
            out += (begins ? "\n" : "") + m.content;
        }
        return true;
    }
    std::vector<llama_chat_message> list;
    size_t                          n_bytes = 256;
    for (const message & m : messages) {
        list.push_back({ m.role.c_str(), m.content.c_str() });
        n_bytes += 2 * (m.role.size() + m.content.size()) + 64;
    }
    out.resize(n_bytes);
    int32_t n = llama_chat_apply_template(c.chat_template.c_str(), list.data(), list.size(), true, out.data(),
                                          (int32_t) out.size());
    if (n > (int32_t) out.size()) {
        out.resize((size_t) n);
        n = llama_chat_apply_template(c.chat_template.c_str(), list.data(), list.size(), true, out.data(),
                                      (int32_t) out.size());
    }
    out.resize(n > 0 ? (size_t) n : 0);
    return n >= 0;
}

// The model's template if libllama knows its kind, else ChatML if the vocabulary has its tokens, else none.
void template_choose(chat & c) {
    const std::vector<message> probe = { { "user", "a" } };
    const char *               own   = llama_model_chat_template(c.session.model, nullptr);
    std::string                text;
    if (own) {
        c.chat_template = own;
        if (conversation_format(c, probe, text)) {
            pinfer_say_note("chat with the model's own template; /help lists the commands");
            return;
        }
    }
    const std::string why = own ? "the model's chat template is of a kind libllama does not know"
                                : "the model has no chat template";
    if (pinfer_session_has_token(c.session, "<|im_start|>") && pinfer_session_has_token(c.session, "<|im_end|>")) {
        c.chat_template = "chatml";
        pinfer_say_note(why + ", ChatML is used; /help lists the commands");
        return;
    }
    c.chat_template.clear();
    pinfer_say_note(why + ": what you type is plainly continued, by at most " +
                    std::to_string(c.args.n_predict >= 0 ? c.args.n_predict : plain_answer_tokens) +
                    " tokens (-n); /help lists the commands");
}

bool conversation_tokenize(const chat & c, std::string & text, std::vector<llama_token> & tokens) {
    if (!conversation_format(c, c.messages, text)) {
        return false;
    }
    const size_t known = c.known_text.size();
    if (known > 0 && text.compare(0, known, c.known_text) == 0) {
        std::vector<llama_token> rest;
        if (!pinfer_session_tokenize(c.session, text.substr(known), false, rest)) {
            return false;
        }
        tokens = c.known_tokens;
        tokens.insert(tokens.end(), rest.begin(), rest.end());
        return true;
    }
    return pinfer_session_tokenize(c.session, text, true, tokens);
}

// Drops the oldest turns until the prompt leaves room for an answer. False when even the last message is too long.
bool conversation_fit(chat & c, std::string & text, std::vector<llama_token> & tokens) {
    const uint32_t n_ctx   = c.session.n_ctx;
    const uint32_t wanted  = c.args.n_predict >= 0 ? (uint32_t) c.args.n_predict : n_ctx;
    const uint32_t reserve = std::max(1u, std::min(wanted, n_ctx / 4));
    size_t         dropped = 0;
    while (tokens.size() + reserve > n_ctx) {
        const size_t first = !c.messages.empty() && c.messages[0].role == "system" ? 1 : 0;
        if (c.messages.size() < first + 3) {  // only the last message is left
            break;
        }
        c.messages.erase(c.messages.begin() + (long) first, c.messages.begin() + (long) first + 2);
        c.known_text.clear();
        dropped++;
        if (!conversation_tokenize(c, text, tokens)) {
            return false;
        }
    }
    if (dropped > 0) {
        pinfer_say_note("the context of " + std::to_string(n_ctx) + " tokens is full: " + std::to_string(dropped) +
                        (dropped == 1 ? " turn was" : " turns were") + " dropped from its beginning");
    }
    if (tokens.size() >= n_ctx) {
        pinfer_say_note("this message makes " + std::to_string(tokens.size()) + " tokens, the context has " +
                        std::to_string(n_ctx) + "; it was not sent (-c makes a larger one)");
        return false;
    }
    return true;
}

// Answers the last message. Returns 0 to go on, else the exit code.
int turn_answer(chat & c) {
    std::string              text;
    std::vector<llama_token> prompt;
    if (!conversation_tokenize(c, text, prompt)) {
        pinfer_say_error("the conversation cannot be formatted or tokenised; /clear begins a new one");
        c.messages.pop_back();
        return 0;
    }
    if (prompt.empty() || !conversation_fit(c, text, prompt)) {
        c.messages.pop_back();
        return 0;
    }
    pinfer_sampler sampler;
    std::string    err;
    // A new seed for each answer, or /regen would repeat the last one.
    if (!pinfer_sampler_create(c.args, c.grammar, c.seed++, c.session, sampler, err)) {
        pinfer_say_error(err);
        return 1;
    }
    if (c.args.verbose) {
        pinfer_say_note(std::to_string(prompt.size()) + " tokens in the conversation, " +
                        std::to_string(pinfer_session_common(c.session, prompt)) + " of them in the KV cache");
    }
    const bool    plain = c.chat_template.empty();
    const int32_t limit = c.args.n_predict >= 0 ? c.args.n_predict : plain ? plain_answer_tokens : -1;
    pinfer_answer answer;
    pinfer_interrupt_stage(PINFER_STAGE_GENERATING);
    pinfer_generate(c.session, sampler, prompt, limit, true, answer);
    pinfer_interrupt_reset();
    pinfer_interrupt_stage(PINFER_STAGE_INPUT);
    pinfer_sampler_free(sampler);

    if (answer.stop != PINFER_STOP_CLOSED && answer.stop != PINFER_STOP_FAILED && !pinfer_stdout_write("\n")) {
        answer.stop  = errno == EPIPE ? PINFER_STOP_CLOSED : PINFER_STOP_FAILED;
        answer.error = std::string("cannot write to stdout: ") + strerror(errno);
    }
    switch (answer.stop) {
        case PINFER_STOP_CLOSED:
            return 141;
        case PINFER_STOP_FAILED:
            pinfer_say_error(answer.error);
            return 1;
        case PINFER_STOP_CONTEXT:
            pinfer_say_note("the context of " + std::to_string(c.session.n_ctx) +
                            " tokens is full, the answer was cut; older turns will be dropped");
            break;
        default:
            break;
    }
    if (answer.tokens.empty() && answer.stop == PINFER_STOP_INTERRUPT) {  // nothing was answered: as if not asked
        c.messages.pop_back();
        return 0;
    }
    c.known_text   = text + answer.text;
    c.known_tokens = prompt;
    c.known_tokens.insert(c.known_tokens.end(), answer.tokens.begin(), answer.tokens.end());
    c.messages.push_back({ "assistant", answer.text });
    return 0;
}

void conversation_clear(chat & c) {
    c.messages.clear();
    c.known_text.clear();
    c.known_tokens.clear();
    if (!c.args.system_prompt.empty()) {
        const std::string & system = c.args.system_prompt;
        c.messages.push_back({ "system", c.args.escape ? pinfer_unescape(system) : system });
    }
}

enum command { COMMAND_NONE, COMMAND_DONE, COMMAND_ANSWER, COMMAND_EXIT };

// A message that is a single word after a slash is a command.
enum command command_run(chat & c, const std::string & text) {
    if (text.size() < 2 || text[0] != '/' ||
        text.find_first_not_of("abcdefghijklmnopqrstuvwxyz", 1) != std::string::npos) {
        return COMMAND_NONE;
    }
    if (text == "/exit") {
        return COMMAND_EXIT;
    }
    if (text == "/clear") {
        conversation_clear(c);
        pinfer_say_note("the conversation begins anew");
        return COMMAND_DONE;
    }
    if (text == "/regen") {
        if (c.messages.empty() || c.messages.back().role != "assistant") {
            pinfer_say_note("there is no answer yet");
            return COMMAND_DONE;
        }
        c.messages.pop_back();
        c.known_text.clear();  // tokenised again, the common beginning stays in the cache
        return COMMAND_ANSWER;
    }
    if (text == "/help") {
        fputs("/regen  another answer to the last message\n"
              "/clear  forget the conversation, keep the system prompt\n"
              "/exit   leave (as does the end of input)\n"
              "A backslash at the end of a line continues the message on the next one; \"\"\" begins and ends a block "
              "of lines.\nCtrl-C stops an answer; at the prompt it leaves.\n",
              stderr);
        return COMMAND_DONE;
    }
    pinfer_say_note("there is no command " + text + "; /help lists them");
    return COMMAND_DONE;
}

} // namespace

int pinfer_chat(const pinfer_arguments & args, const std::string & grammar, const std::string & first_message,
                uint32_t seed, pinfer_session & session) {
    chat c = { args, grammar, session, seed, "", {}, "", {} };
    template_choose(c);
    conversation_clear(c);
    pinfer_interrupt_stage(PINFER_STAGE_INPUT);

    input       in;
    std::string text = first_message;
    while (true) {
        if (text.empty()) {
            switch (message_read(in, text)) {
                case INPUT_LINE:
                    break;
                case INPUT_END:
                    return 0;
                case INPUT_INTERRUPT:
                    prompt_show("\n");
                    return 130;
            }
        }
        const enum command command = command_run(c, text);
        if (command == COMMAND_EXIT) {
            return 0;
        }
        if (command == COMMAND_NONE && text.find_first_not_of(" \t\n") != std::string::npos) {
            c.messages.push_back({ "user", text });
        }
        const bool ask = command == COMMAND_ANSWER || (!c.messages.empty() && c.messages.back().role == "user");
        text.clear();
        if (ask && command != COMMAND_DONE) {
            const int code = turn_answer(c);
            if (code != 0) {
                return code;
            }
        }
    }
}
