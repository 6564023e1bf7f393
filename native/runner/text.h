// text.h: bytes that tokens become: UTF-8 that is never cut in the middle, and writing to stdout.
#pragma once

#include <cstddef>
#include <string>

// A token may hold a part of a character. The stream passes on what is complete, keeps back the beginning of a
// character until its rest arrives, and replaces what can never become UTF-8 by U+FFFD.
struct pinfer_utf8_stream {
    std::string held;  // 0 to 3 bytes: the beginning of a character
};

std::string pinfer_utf8_push(pinfer_utf8_stream & stream, const char * bytes, size_t n);
std::string pinfer_utf8_flush(pinfer_utf8_stream & stream);  // what was held back, replaced

std::string pinfer_utf8_clean(const std::string & bytes);    // the same for a whole text
std::string pinfer_json_string(const std::string & bytes);   // with quotes, escaped, always valid UTF-8

// Backslash escapes of a prompt given on the command line, as in llama.cpp: \n \r \t \' \" \\ \xHH.
std::string pinfer_unescape(const std::string & text);

// Writes all bytes to stdout at once. On failure returns false and sets errno; a closed pipe is EPIPE.
bool pinfer_stdout_write(const std::string & bytes);

// Whole file ("-": stdin). On failure returns false and writes the cause into err.
bool pinfer_file_read(const std::string & path, std::string & out, std::string & err);
