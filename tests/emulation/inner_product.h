// How tensor cores add the products of fp16 operands to a float32 accumulator, bit for bit.
//
// The terms, several products and the accumulator, are aligned to the largest exponent among them and truncated towards
// zero a few bits below the last bit of float32. Their sum is exact, and is rounded towards zero to float32. The
// numbers of products and of extra bits are those that Khattak and Mikaitis (arXiv:2512.07004) found for each GPU.
// Their models align by the exponents of the factors, this one by those of the products: it truncates at the same bit
// or one higher.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulation {

struct HopperUnit { // H100, H200, B200
    static constexpr int kProducts = 16, kExtraBits = 2;
};
struct AmpereUnit { // A100: less accurate than later GPUs
    static constexpr int kProducts = 8, kExtraBits = 1;
};

typedef float Four __attribute__((vector_size(16))); // four columns at a time
typedef int32_t FourInts __attribute__((vector_size(16)));

template <class To, class From> To same_bits(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline FourInts without_sign(FourInts bits) { return bits & 0x7fffffff; }
inline FourInts magnitude(FourInts value) { return value < 0 ? -value : value; }
inline FourInts larger(FourInts a, FourInts b) { return a > b ? a : b; }

// accumulator + the sum of Unit::kProducts products a[k] * b[k * stride].
template <class Unit> Four add_products(const float* a, const Four* b, int stride, Four accumulator) {
    constexpr int kLeastExponent = 32; // biased: below it float32 has no such scales; fp16 products are larger
    Four products[Unit::kProducts], plain = accumulator;
    FourInts largest = without_sign(same_bits<FourInts>(accumulator));
    for (int k = 0; k < Unit::kProducts; ++k) {
        products[k] = a[k] * b[k * stride]; // exact
        plain += products[k];
        largest = larger(largest, without_sign(same_bits<FourInts>(products[k])));
    }
    FourInts exponent = largest >> 23, special = exponent == 255; // infinities and NaN
    exponent = larger(exponent, FourInts{} + kLeastExponent);
    Four to_units = same_bits<Four>((277 + Unit::kExtraBits - exponent) << 23);
    Four from_units = same_bits<Four>((exponent - 23 - Unit::kExtraBits) << 23);
    FourInts sum = __builtin_convertvector(accumulator * to_units, FourInts); // towards zero
    for (int k = 0; k < Unit::kProducts; ++k) sum += __builtin_convertvector(products[k] * to_units, FourInts);
    Four rounded = __builtin_convertvector(sum, Four);                                           // to the nearest
    FourInts too_large = magnitude(__builtin_convertvector(rounded, FourInts)) > magnitude(sum); // -1 where it is
    Four result = same_bits<Four>(same_bits<FourInts>(rounded) + too_large) * from_units;
    return same_bits<Four>((same_bits<FourInts>(plain) & special) | (same_bits<FourInts>(result) & ~special));
}

} // namespace emulation
