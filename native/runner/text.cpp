// text.cpp: UTF-8 by the table of the Unicode standard (3.9, "well-formed byte sequences"), JSON strings, stdin/stdout.
#include "text.h"

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

namespace {

const char * const replacement = "\xEF\xBF\xBD";  // U+FFFD

// Length of the well-formed character at p, 0 if p[0..n) begins one whose rest is missing, -1 if it cannot be one.
int character_length(const unsigned char * p, size_t n) {
    const unsigned char c = p[0];
    if (c < 0x80) {
        return 1;
    }
    int           length = 0;
    unsigned char low    = 0x80;  // range of the second byte: it excludes overlong forms and surrogates
    unsigned char high   = 0xBF;
    if (c >= 0xC2 && c <= 0xDF) {
        length = 2;
    } else if (c >= 0xE0 && c <= 0xEF) {
        length = 3;
        low    = c == 0xE0 ? 0xA0 : 0x80;
        high   = c == 0xED ? 0x9F : 0xBF;
    } else if (c >= 0xF0 && c <= 0xF4) {
        length = 4;
        low    = c == 0xF0 ? 0x90 : 0x80;
        high   = c == 0xF4 ? 0x8F : 0xBF;
    } else {
        return -1;
    }
    for (int i = 1; i < length; i++) {
        if ((size_t) i >= n) {
            return 0;
        }
        if (p[i] < low || p[i] > high) {
            return -1;
        }
        low  = 0x80;
        high = 0xBF;
    }
    return length;
}

} // namespace

std::string pinfer_utf8_push(pinfer_utf8_stream & stream, const char * bytes, size_t n) {
    stream.held.append(bytes, n);
    const std::string in = std::move(stream.held);
    stream.held.clear();

    std::string out;
    size_t      i = 0;
    while (i < in.size()) {
        const int length = character_length((const unsigned char *) in.data() + i, in.size() - i);
        if (length == 0) {
            stream.held = in.substr(i);
            break;
        }
        if (length < 0) {
            out += replacement;
            i++;
        } else {
            out.append(in, i, (size_t) length);
            i += (size_t) length;
        }
    }
    return out;
}

std::string pinfer_utf8_flush(pinfer_utf8_stream & stream) {
    const bool any = !stream.held.empty();
    stream.held.clear();
    return any ? replacement : "";
}

std::string pinfer_utf8_clean(const std::string & bytes) {
    pinfer_utf8_stream stream;
    std::string        out = pinfer_utf8_push(stream, bytes.data(), bytes.size());
    return out + pinfer_utf8_flush(stream);
}

std::string pinfer_json_string(const std::string & bytes) {
    std::string out = "\"";
    for (const char c : pinfer_utf8_clean(bytes)) {
        switch (c) {
            case '"':  out += "\\\""; break;
            case '\\': out += "\\\\"; break;
            case '\n': out += "\\n";  break;
            case '\r': out += "\\r";  break;
            case '\t': out += "\\t";  break;
            default:
                if ((unsigned char) c < 0x20 || c == 0x7F) {
                    char code[8];
                    snprintf(code, sizeof(code), "\\u%04x", (unsigned) (unsigned char) c);
                    out += code;
                } else {
                    out += c;
                }
        }
    }
    return out + "\"";
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    if (c >= 'a' && c <= 'f') {
        return c - 'a' + 10;
    }
    if (c >= 'A' && c <= 'F') {
        return c - 'A' + 10;
    }
    return -1;
}

std::string pinfer_unescape(const std::string & text) {
    std::string out;
    for (size_t i = 0; i < text.size(); i++) {
        if (text[i] != '\\' || i + 1 == text.size()) {
            out += text[i];
            continue;
        }
        const char c = text[++i];
        switch (c) {
            case 'n':  out += '\n'; break;
            case 'r':  out += '\r'; break;
            case 't':  out += '\t'; break;
            case '\'': out += '\''; break;
            case '"':  out += '"';  break;
            case '\\': out += '\\'; break;
            case 'x':
                if (i + 2 < text.size() && hex_digit(text[i + 1]) >= 0 && hex_digit(text[i + 2]) >= 0) {
                    out += (char) (hex_digit(text[i + 1]) * 16 + hex_digit(text[i + 2]));
                    i += 2;
                    break;
                }
                [[fallthrough]];
            default:
                out += '\\';
                out += c;
        }
    }
    return out;
}

bool pinfer_stdout_write(const std::string & bytes) {
    size_t done = 0;
    while (done < bytes.size()) {
        const ssize_t n = write(STDOUT_FILENO, bytes.data() + done, bytes.size() - done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return false;
        }
        done += (size_t) n;
    }
    return true;
}

bool pinfer_file_read(const std::string & path, std::string & out, std::string & err) {
    const bool is_stdin = path == "-";
    const int  fd       = is_stdin ? STDIN_FILENO : open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        err = "cannot read " + path + ": " + strerror(errno);
        return false;
    }
    out.clear();
    char    buffer[1 << 16];
    ssize_t n = 0;
    while ((n = read(fd, buffer, sizeof(buffer))) != 0) {
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            err = "cannot read " + path + ": " + strerror(errno);
            break;
        }
        out.append(buffer, (size_t) n);
    }
    if (!is_stdin) {
        close(fd);
    }
    return n == 0;
}
