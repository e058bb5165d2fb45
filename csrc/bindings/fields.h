// The fields of every params struct, each listed once: its name is the keyword of the Python function.
//
// bind.h checks at compile time that a list has as many fields as its struct. A field that is a list of fields itself
// (product, tile) contributes its own keywords.
#pragma once

#include "../kernels/loss.h"
#include "../kernels/search.h"
#include "../kernels/step.h"
#include "../kernels/tensor.h"

namespace fm::python {

#define FM_FIELD(name) visit(#name, p.name)

template <class T, class Visit> constexpr void for_each_field(RowNormalize<T>& p, Visit&& visit) {
    FM_FIELD(rows), FM_FIELD(normalized), FM_FIELD(inverse_norm), FM_FIELD(count), FM_FIELD(size);
}

template <class T, class Visit> constexpr void for_each_field(TargetCosine<T>& p, Visit&& visit) {
    FM_FIELD(embeddings), FM_FIELD(weight), FM_FIELD(labels), FM_FIELD(cosine), FM_FIELD(row), FM_FIELD(bad_label),
        FM_FIELD(samples), FM_FIELD(classes), FM_FIELD(size), FM_FIELD(ignore_index), FM_FIELD(sub_centers),
        FM_FIELD(inner_product);
}

template <class T, class Visit> constexpr void for_each_field(ExponentSum<T>& p, Visit&& visit) {
    FM_FIELD(logits_chunk), FM_FIELD(inverse_norm), FM_FIELD(bias), FM_FIELD(labels), FM_FIELD(hard_threshold),
        FM_FIELD(hard_strength), FM_FIELD(scale), FM_FIELD(fixed_exponent), FM_FIELD(exponent), FM_FIELD(sum),
        FM_FIELD(samples), FM_FIELD(chunk), FM_FIELD(class_begin), FM_FIELD(sub_centers);
}

template <class Visit> constexpr void for_each_field(MarginRows& p, Visit&& visit) {
    FM_FIELD(negative_logsumexp), FM_FIELD(target_cosine), FM_FIELD(uniform_cosine), FM_FIELD(labels),
        FM_FIELD(class_weight), FM_FIELD(scale), FM_FIELD(m1), FM_FIELD(m2), FM_FIELD(m3), FM_FIELD(annealing),
        FM_FIELD(beyond_pi), FM_FIELD(easy), FM_FIELD(straight_through), FM_FIELD(smallest_sine),
        FM_FIELD(label_smoothing), FM_FIELD(class_weight_sum), FM_FIELD(loss), FM_FIELD(row_weight),
        FM_FIELD(derivatives), FM_FIELD(samples), FM_FIELD(classes), FM_FIELD(ignore_index);
}

template <class T, class Visit> constexpr void for_each_field(ProjectWeightGradient<T>& p, Visit&& visit) {
    FM_FIELD(gradient), FM_FIELD(weight), FM_FIELD(inverse_norm), FM_FIELD(dense_scale),
        FM_FIELD(normalized_embeddings), FM_FIELD(sorted_labels), FM_FIELD(label_order), FM_FIELD(target_gradient),
        FM_FIELD(uniform_direction), FM_FIELD(class_weight), FM_FIELD(length_gradient), FM_FIELD(nearest),
        FM_FIELD(sorted_nearest), FM_FIELD(nearest_order), FM_FIELD(nearest_gradient), FM_FIELD(samples),
        FM_FIELD(classes), FM_FIELD(size), FM_FIELD(class_begin), FM_FIELD(chunk), FM_FIELD(inner_product);
}

template <class Visit> constexpr void for_each_field(Update& p, Visit&& visit) {
    FM_FIELD(rule), FM_FIELD(lr), FM_FIELD(beta1), FM_FIELD(beta2), FM_FIELD(eps), FM_FIELD(weight_decay),
        FM_FIELD(correction1), FM_FIELD(correction2);
}

template <class T, class Visit> constexpr void for_each_field(StepRows<T>& p, Visit&& visit) {
    FM_FIELD(completion), FM_FIELD(added), FM_FIELD(selected), FM_FIELD(parameter), FM_FIELD(momentum),
        FM_FIELD(second_moment), FM_FIELD(update), FM_FIELD(project), FM_FIELD(momentum_only), FM_FIELD(stochastic),
        FM_FIELD(seed), FM_FIELD(step), FM_FIELD(first_row), FM_FIELD(skip);
}

template <class T, class Visit> constexpr void for_each_field(ProjectEmbeddingGradient<T>& p, Visit&& visit) {
    FM_FIELD(gradient), FM_FIELD(normalized_embeddings), FM_FIELD(inverse_norm), FM_FIELD(weight),
        FM_FIELD(weight_inverse_norm), FM_FIELD(labels), FM_FIELD(row_scale), FM_FIELD(scale),
        FM_FIELD(target_gradient), FM_FIELD(uniform_gradient), FM_FIELD(uniform_weight), FM_FIELD(scale_gradient),
        FM_FIELD(samples), FM_FIELD(classes), FM_FIELD(size), FM_FIELD(inner_product);
}

template <class T, class Visit> constexpr void for_each_field(NearestTile<T>& p, Visit&& visit) {
    FM_FIELD(scores), FM_FIELD(cosine), FM_FIELD(index), FM_FIELD(rows), FM_FIELD(columns), FM_FIELD(row_begin),
        FM_FIELD(column_begin);
}

template <class Visit> constexpr void for_each_field(QuantizeRows& p, Visit&& visit) {
    FM_FIELD(rows), FM_FIELD(selected), FM_FIELD(inner_product), FM_FIELD(codes), FM_FIELD(scale), FM_FIELD(count),
        FM_FIELD(size);
}

template <class Visit> constexpr void for_each_field(MeasureQuantization& p, Visit&& visit) {
    FM_FIELD(rows), FM_FIELD(codes), FM_FIELD(scale), FM_FIELD(inner_product), FM_FIELD(rounding),
        FM_FIELD(inverse_norm), FM_FIELD(norm), FM_FIELD(length), FM_FIELD(error), FM_FIELD(count), FM_FIELD(size);
}

template <class Visit> constexpr void for_each_field(ScoreTile& p, Visit&& visit) {
    FM_FIELD(scores), FM_FIELD(row_index), FM_FIELD(row_begin), FM_FIELD(row_id), FM_FIELD(column_begin),
        FM_FIELD(column_first_id), FM_FIELD(same_set);
}

template <class Visit> constexpr void for_each_field(UpdateCandidates& p, Visit&& visit) {
    FM_FIELD(tile), FM_FIELD(row_scale), FM_FIELD(column_scale), FM_FIELD(row_candidates), FM_FIELD(column_candidates),
        FM_FIELD(refreshed);
}

template <class Visit> constexpr void for_each_field(RemoveRefreshed& p, Visit&& visit) {
    FM_FIELD(candidates), FM_FIELD(refreshed_rows), FM_FIELD(refreshed_candidates), FM_FIELD(count);
}

template <class Visit> constexpr void for_each_field(RerankCandidates& p, Visit&& visit) {
    FM_FIELD(query), FM_FIELD(reference), FM_FIELD(candidates), FM_FIELD(nearest), FM_FIELD(reference_first_id),
        FM_FIELD(references), FM_FIELD(query_first_id), FM_FIELD(same_set), FM_FIELD(queries), FM_FIELD(size);
}

template <class Visit> constexpr void for_each_field(SearchExact& p, Visit&& visit) {
    FM_FIELD(tile), FM_FIELD(query), FM_FIELD(reference), FM_FIELD(row_nearest), FM_FIELD(column_nearest),
        FM_FIELD(refreshed), FM_FIELD(size);
}

template <class Visit> constexpr void for_each_field(cuda::PackOperand& p, Visit&& visit) {
    FM_FIELD(rows), FM_FIELD(packed), FM_FIELD(inverse_norm), FM_FIELD(count), FM_FIELD(size), FM_FIELD(width),
        FM_FIELD(parts);
}

template <class Visit> constexpr void for_each_field(cuda::PrepareRows& p, Visit&& visit) {
    FM_FIELD(labels), FM_FIELD(scale), FM_FIELD(exponent), FM_FIELD(prepared), FM_FIELD(samples);
}

template <class Visit> constexpr void for_each_field(cuda::CombinePartials& p, Visit&& visit) {
    FM_FIELD(partial), FM_FIELD(negative_logsumexp), FM_FIELD(exponent), FM_FIELD(slots), FM_FIELD(samples);
}

template <class Visit> constexpr void for_each_field(cuda::UnpackNearest& p, Visit&& visit) {
    FM_FIELD(best), FM_FIELD(index), FM_FIELD(count);
}

template <class Visit> constexpr void for_each_field(cuda::TensorProduct& p, Visit&& visit) {
    FM_FIELD(left), FM_FIELD(right), FM_FIELD(rows), FM_FIELD(columns), FM_FIELD(width), FM_FIELD(parts);
}

template <class Visit> constexpr void for_each_field(cuda::TensorDump& p, Visit&& visit) {
    FM_FIELD(product), FM_FIELD(wide), FM_FIELD(out);
}

template <class Visit> constexpr void for_each_field(cuda::TensorExponentSum& p, Visit&& visit) {
    FM_FIELD(product), FM_FIELD(prepared), FM_FIELD(scale_value), FM_FIELD(fixed_exponent), FM_FIELD(class_begin),
        FM_FIELD(partial);
}

template <class Visit> constexpr void for_each_field(cuda::TensorProbabilities& p, Visit&& visit) {
    FM_FIELD(product), FM_FIELD(prepared), FM_FIELD(class_begin), FM_FIELD(probabilities), FM_FIELD(stride),
        FM_FIELD(low);
}

template <class Visit> constexpr void for_each_field(cuda::TensorNearest& p, Visit&& visit) {
    FM_FIELD(product), FM_FIELD(row_begin), FM_FIELD(column_begin), FM_FIELD(best);
}

#undef FM_FIELD

} // namespace fm::python
