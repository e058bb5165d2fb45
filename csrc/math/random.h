// Philox4x32-10, a counter-based random generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011),
// and stochastic rounding to bfloat16.
#pragma once

#include "platform.h"

namespace fm {

// Four independent random words of a counter.
FM_HD void philox(uint32_t key0, uint32_t key1, uint32_t (&counter)[4]) {
    for (int round = 0; round < 10; ++round) {
        uint64_t first = static_cast<uint64_t>(counter[0]) * 0xD2511F53u;
        uint64_t second = static_cast<uint64_t>(counter[2]) * 0xCD9E8D57u;
        counter[0] = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key0;
        counter[1] = static_cast<uint32_t>(second);
        counter[2] = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key1;
        counter[3] = static_cast<uint32_t>(first);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// The random words of elements 4 group ... 4 group + 3 of row r at a step. The step and the row have 48 bits.
FM_HD void random_words(uint64_t seed, uint64_t step, uint64_t r, uint32_t group, uint32_t (&words)[4]) {
    words[0] = group;
    words[1] = static_cast<uint32_t>(r);
    words[2] = static_cast<uint32_t>(step);
    words[3] = static_cast<uint32_t>(r >> 32) << 16 | (static_cast<uint32_t>(step >> 32) & 0xffffu);
    philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), words);
}

FM_HD uint16_t to_bfloat16_plus(float value, uint32_t added) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u; // NaN
    return static_cast<uint16_t>((bits + added) >> 16);
}
// Rounds to the nearest, to the even one of two equally near.
FM_HD uint16_t to_bfloat16(float value) { return to_bfloat16_plus(value, 0x7fffu + (bits_of(value) >> 16 & 1u)); }
// Rounds up in magnitude with the probability of the dropped fraction; random has 16 bits.
FM_HD uint16_t to_bfloat16(float value, uint32_t random) { return to_bfloat16_plus(value, random); }

} // namespace fm
