// generate.cpp: the loop around decode and sample.
#include "generate.h"

#include "interrupt.h"

#include <cerrno>
#include <cstring>

const char * pinfer_stop_name(enum pinfer_stop stop) {
    switch (stop) {
        case PINFER_STOP_EOG:       return "eog";
        case PINFER_STOP_LENGTH:    return "length";
        case PINFER_STOP_CONTEXT:   return "context";
        case PINFER_STOP_INTERRUPT: return "interrupt";
        case PINFER_STOP_CLOSED:    return "closed";
        case PINFER_STOP_FAILED:    return "failed";
    }
    return "failed";
}

// False when stdout takes no more; the answer's stop says why.
static bool stream_write(const std::string & text, pinfer_answer & answer) {
    if (text.empty() || pinfer_stdout_write(text)) {
        return true;
    }
    answer.stop = errno == EPIPE ? PINFER_STOP_CLOSED : PINFER_STOP_FAILED;
    if (answer.stop == PINFER_STOP_FAILED) {
        answer.error = std::string("cannot write to stdout: ") + strerror(errno);
    }
    return false;
}

// False when the decode ends the answer.
static bool decode_check(enum pinfer_decode_result result, const pinfer_session & session, pinfer_answer & answer) {
    switch (result) {
        case PINFER_DECODE_OK:          return true;
        case PINFER_DECODE_FULL:        answer.stop = PINFER_STOP_CONTEXT;   return false;
        case PINFER_DECODE_INTERRUPTED: answer.stop = PINFER_STOP_INTERRUPT; return false;
        case PINFER_DECODE_FAILED:      break;
    }
    answer.stop  = PINFER_STOP_FAILED;
    answer.error = session.error;
    return false;
}

static void tokens_generate(pinfer_session & session, pinfer_sampler & sampler, int32_t n_predict, bool stream,
                            pinfer_utf8_stream & characters, pinfer_answer & answer) {
    while (n_predict < 0 || answer.tokens.size() < (size_t) n_predict) {
        if (pinfer_interrupted()) {
            answer.stop = PINFER_STOP_INTERRUPT;
            return;
        }
        llama_token token;
        if (!pinfer_sampler_next(sampler, session, token, answer.error)) {
            answer.stop = PINFER_STOP_FAILED;
            return;
        }
        if (llama_vocab_is_eog(session.vocab, token)) {
            answer.stop = PINFER_STOP_EOG;
            return;
        }
        const std::string piece = pinfer_session_piece(session, token);
        answer.tokens.push_back(token);
        answer.text += piece;
        if (stream && !stream_write(pinfer_utf8_push(characters, piece.data(), piece.size()), answer)) {
            return;
        }
        if (n_predict >= 0 && answer.tokens.size() == (size_t) n_predict) {
            break;  // the last token need not be decoded
        }
        if (!decode_check(pinfer_session_append(session, token), session, answer)) {
            return;
        }
    }
    answer.stop = PINFER_STOP_LENGTH;
}

void pinfer_generate(pinfer_session & session, pinfer_sampler & sampler, const std::vector<llama_token> & prompt,
                     int32_t n_predict, bool stream, pinfer_answer & answer) {
    answer = {};
    if (!decode_check(pinfer_session_sync(session, prompt), session, answer)) {
        return;
    }
    pinfer_sampler_see(sampler, prompt);
    pinfer_utf8_stream characters;
    tokens_generate(session, sampler, n_predict, stream, characters, answer);
    if (stream && answer.stop != PINFER_STOP_CLOSED && answer.stop != PINFER_STOP_FAILED) {
        stream_write(pinfer_utf8_flush(characters), answer);
    }
}
