// What the tensor-core products need before and after them: fp16 operands, logsumexp of the slots, indices of keys.
#include "logit.h"
#include "warp.h"

#include "../math/element.h"

namespace fm::cuda {
namespace {

// One warp to a row, two neighbouring elements to a lane.
__global__ void pack_operand(PackOperand p) {
    int64_t r = warp_row();
    if (r >= p.count) return;
    double squares = 0.0;
    for (int64_t d = lane(); d < p.size; d += kWarp) {
        auto x = element<double>(p.rows, r, d);
        squares += x * x;
    }
    double inverse = inverse_norm_of(warp_sum(squares));
    if (lane() == 0 && p.inverse_norm) p.inverse_norm[r] = static_cast<float>(inverse);
    auto scale = static_cast<float>(inverse * kOperandScale);
    auto* high = reinterpret_cast<uint32_t*>(p.packed + r * p.parts * p.width);
    uint32_t* low = high + p.width / 2;
    for (int64_t k = lane(); k < p.width / 2; k += kWarp) {
        float a = 2 * k < p.size ? element<float>(p.rows, r, 2 * k) * scale : 0.0f;
        float b = 2 * k + 1 < p.size ? element<float>(p.rows, r, 2 * k + 1) * scale : 0.0f;
        uint32_t word = pack_half(a, b);
        high[k] = word;
        if (p.parts == 2) low[k] = pack_half(a - low_half(word), b - high_half(word));
    }
}

__global__ void prepare_rows(PrepareRows p) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i >= p.samples) return;
    Logit logit = Logit::of(p.scale ? p.scale[i] : p.scale_value);
    float lowest = rintf(logit(-1.001f * kOperandScale * kOperandScale, 1.0f));
    p.rows[i] = {logit.high, logit.low, p.exponent ? static_cast<float>(p.exponent[i]) : lowest,
                 static_cast<int>(p.labels[i])};
}

// One warp to a row.
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
    double logsumexp2 = sum == 0.0 ? -INFINITY : log2(sum) + top; // a NaN stays one
    p.negative_logsumexp[i] = logsumexp2 * 0.6931471805599453;
    p.exponent[i] = isfinite(logsumexp2) ? rint(logsumexp2) : 0.0;
}

__global__ void unpack_nearest(UnpackNearest p) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i >= p.count) return;
    unsigned long long key = p.best[i];
    // a class of NaN found none: any other serves, the cosine with it is NaN
    p.index[i] = key ? static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(key)) : (i == 0 ? 1 : 0);
}

} // namespace

void run(const PackOperand& p, void* stream) {
    launch(pack_operand, warp_blocks(p.count), kWarpsPerBlock * kWarp, stream, p);
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
