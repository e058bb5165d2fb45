// The product of two fp16 matrices as torch computes it on CUDA: on the tensor cores, with float32 sums.
#include "inner_product.h"

#include <vector>

// out [rows, columns] = left [rows, inner] right [inner, columns], halves held as floats. Contiguous; inner is a
// multiple of 16 and columns of 4.
extern "C" __attribute__((visibility("default"))) void half_product(const float* left, const float* right, float* out,
                                                                    int64_t rows, int64_t inner, int64_t columns) {
    using namespace emulation;
    const auto* factors = reinterpret_cast<const Four*>(right);
    int64_t width = columns / 4;
#pragma omp parallel for
    for (int64_t i = 0; i < rows; ++i) {
        std::vector<Four> sums(static_cast<size_t>(width), Four{});
        for (int64_t k = 0; k < inner; k += AmpereUnit::kProducts)
            for (int64_t j = 0; j < width; ++j)
                sums[static_cast<size_t>(j)] =
                    add_products<AmpereUnit>(left + i * inner + k, factors + k * width + j, static_cast<int>(width),
                                             sums[static_cast<size_t>(j)]);
        memcpy(out + i * columns, sums.data(), sizeof(Four) * sums.size());
    }
}
