// checksum.cpp: pinfer_checksum(), as docs/formats.md defines it. Eight independent lanes keep the multiplier busy, so it runs
// at the speed of memory; every step is a bijection of its lane, so no change of one 8-byte word goes unnoticed.
#include "pinfer.h"

#include <cstring>

static const int      LANES    = 8;
static const uint64_t MULTIPLY = 0x9e3779b97f4a7c15ull;

static inline uint64_t mix(uint64_t state, uint64_t word) {
    const uint64_t v = (state ^ word) * MULTIPLY;
    return v << 29 | v >> 35;
}

uint64_t pinfer_checksum(const void * data, size_t size) {
    const uint8_t * p = (const uint8_t *) data;
    uint64_t        lane[LANES], word[LANES];
    for (int i = 0; i < LANES; i++) {
        lane[i] = (uint64_t) i;
    }
    size_t left = size;
    for (; left >= sizeof(word); left -= sizeof(word), p += sizeof(word)) {
        memcpy(word, p, sizeof(word));
        for (int i = 0; i < LANES; i++) {
            lane[i] = mix(lane[i], word[i]);
        }
    }
    if (left) {
        memset(word, 0, sizeof(word));
        memcpy(word, p, left);
        for (int i = 0; i < LANES; i++) {
            lane[i] = mix(lane[i], word[i]);
        }
    }
    uint64_t hash = size;
    for (int i = 0; i < LANES; i++) {
        hash = mix(hash, lane[i]);
    }
    return hash ^ hash >> 32;
}
