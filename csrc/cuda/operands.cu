// The kernels before and after the tensor-core products: fp16 operands, logsumexp of the slots, indices of the keys.
#include "logit.h"
#include "row.h"

namespace fm::cuda {
namespace {

// One warp per row. A lane has groups of 8 adjacent elements, which are 16 bytes of the operand.
template <int K, Access A> using OperandPiece = Piece<float, 8, K, A>;

template <class Piece, class S> __global__ void pack_operand(PackOperand p) {
    int64_t r = warp_row();
    if (r >= p.count) return;
    const Row<S> row(p.rows, r);
    const int64_t last = Piece::last(p.width);
    Piece x;
    double squares = 0.0;
    for (int64_t begin = 0; begin <= last; begin += Piece::kSize) {
        Piece::template read<double>(row, begin, p.size, [&](int k, const double (&values)[Piece::kGroup]) {
            FM_UNROLL
            for (int e = 0; e < Piece::kGroup; ++e) {
                squares += values[e] * values[e];
                x.value[k][e] = static_cast<float>(values[e]);
            }
        });
    }
    double inverse = inverse_norm_of(warp_sum(squares));
    if (lane() == 0 && p.inverse_norm) p.inverse_norm[r] = static_cast<float>(inverse);
    const auto scale = static_cast<float>(inverse * kOperandScale);
    uint16_t* high = p.packed + r * p.parts * p.width;
    for (int64_t begin = last; begin >= 0; begin -= Piece::kSize) { // the last piece is still in registers
        if (begin < last) x.load(row, begin, p.size);
        FM_UNROLL
        for (int k = 0; k < Piece::kGroups; ++k) {
            const int64_t at = begin + Piece::offset(k, 0);
            uint32_t words[4], rest[4];
            FM_UNROLL
            for (int i = 0; i < 4; ++i) { // 0 beyond the row's end, even if scale is NaN
                float a = at + 2 * i < p.size ? x.value[k][2 * i] * scale : 0.0f;
                float b = at + 2 * i + 1 < p.size ? x.value[k][2 * i + 1] * scale : 0.0f;
                words[i] = pack_half(a, b);
                rest[i] = pack_half(a - low_half(words[i]), b - high_half(words[i]));
            }
            if (at >= p.width) continue;
            store_16_bytes(high + at, words);
            if (p.parts == 2) store_16_bytes(high + p.width + at, rest);
        }
    }
}

__global__ void prepare_rows(PrepareRows p) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i >= p.samples) return;
    Logit logit = Logit::of(value_at(p.scale, i));
    float lowest = rintf(logit(-1.001f * kOperandScale * kOperandScale, 1.0f));
    const int label =
        p.labels[i] < 0 ? -1 : static_cast<int>(p.labels[i]); // a class of another rank does not fit an int
    p.prepared[i] = {logit.high, logit.low, p.exponent ? static_cast<float>(p.exponent[i]) : lowest, label};
}

// One warp per row.
__global__ void combine_partials(CombinePartials p) {
    int64_t i = warp_row();
    if (i >= p.samples) return;
    double top = -INFINITY;
    for (int64_t s = lane(); s < p.slots; s += kWarp) {
        Partial partial = p.partial[s * p.samples + i];
        if (partial.sum != 0.0f) top = fmax(top, static_cast<double>(partial.exponent));
    }
    top = warp_reduce(top, [](double a, double b) { return fmax(a, b); });
    double sum = 0.0;
    for (int64_t s = lane(); s < p.slots; s += kWarp) {
        Partial partial = p.partial[s * p.samples + i];
        if (partial.sum != 0.0f)
            sum += static_cast<double>(partial.sum) * exp2(static_cast<double>(partial.exponent) - top);
    }
    sum = warp_sum(sum);
    if (lane() > 0) return;
    double logsumexp2 = sum == 0.0 ? -INFINITY : log2(sum) + top; // NaN stays
    p.negative_logsumexp[i] = logsumexp2 * kLn2;
    p.exponent[i] = isfinite(logsumexp2) ? rint(logsumexp2) : 0.0;
}

__global__ void unpack_nearest(UnpackNearest p) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i >= p.count) return;
    unsigned long long key = p.best[i];
    // a class of NaN has found none: any other will do, because the cosine is NaN
    p.index[i] = key ? static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key)) : (i == 0 ? 1 : 0);
}

} // namespace

void run(const PackOperand& p, void* stream) {
    dispatch_dtype(p.rows.dtype, [&](auto s) {
        using S = decltype(s);
        auto kernel = pack_operand<OperandPiece<2, Access::adjacent>, S>;
        if (has_vectors<8>(p.rows, p.size))
            kernel = p.width <= 512 ? pack_operand<OperandPiece<2, Access::vectors>, S>
                                    : pack_operand<OperandPiece<4, Access::vectors>, S>;
        launch_warp_rows(kernel, p.count, stream, p);
    });
}
void run(const PrepareRows& p, void* stream) {
    launch(prepare_rows, (p.samples + kRowThreads - 1) / kRowThreads, kRowThreads, stream, p);
}
void run(const CombinePartials& p, void* stream) {
    launch(combine_partials, warp_blocks(p.samples), kWarpsPerBlock * kWarp, stream, p);
}
void run(const UnpackNearest& p, void* stream) {
    launch(unpack_nearest, (p.count + kRowThreads - 1) / kRowThreads, kRowThreads, stream, p);
}

} // namespace fm::cuda
