// The Python face of a backend. The CPU and the CUDA module offer the same five functions on the same integers; each
// defines `launch` for the five parameter structs. Terms are null for a plain loss.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "row.h"

namespace fused_losses {

// Throw std::runtime_error when the work could not be started. stream: a cudaStream_t; 0 and unused on CPU.
void launch(const LossAndGradParams&, const Terms* terms, uintptr_t stream);
void launch(const StatsParams&, const Terms* terms, uintptr_t stream);
void launch(const ObjectiveParams&, const Terms* terms, uintptr_t stream);
void launch(const GradParams&, const Terms* terms, uintptr_t stream);
void launch(const ScaleParams&, uintptr_t stream);

namespace bindings {

namespace py = pybind11;

using RowsArg = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;  // data, n, inner, strides
using ColumnArg = std::tuple<uintptr_t, int64_t, float>;                    // data or 0, stride, value
using TargetsArg = std::tuple<uintptr_t, bool, int64_t, int64_t>;           // data, is_int64, ignore_index, K
// softcap, entropy, label_smoothing, z_loss, shares or 0, importance_weights, ref_logprobs, kl_coef, entropy_coef,
// log_ratio_clamp, kl_type, kl_weighted_by_ratio
using TermsArg = std::optional<
    std::tuple<float, bool, float, float, uintptr_t, ColumnArg, ColumnArg, ColumnArg, ColumnArg, ColumnArg, int, bool>>;

inline Rows rows(const RowsArg& a) {
    return {reinterpret_cast<void*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a), std::get<4>(a)};
}
inline Column column(const ColumnArg& a) {
    return {reinterpret_cast<const float*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a)};
}
inline Targets targets(const TargetsArg& a) {
    return {reinterpret_cast<const void*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}
inline float* floats(uintptr_t p) { return reinterpret_cast<float*>(p); }

inline Tokens tokens(const TargetsArg& t, int objective, const std::vector<ColumnArg>& inputs, const ColumnArg& w) {
    if (inputs.size() > kMaxInputs) throw std::invalid_argument("an objective takes at most 7 inputs");
    Tokens out{targets(t), static_cast<Objective>(objective), static_cast<int>(inputs.size()), {}, column(w)};
    for (size_t i = 0; i < inputs.size(); ++i) out.inputs[i] = column(inputs[i]);
    return out;
}

inline std::optional<Terms> terms(const TermsArg& a) {
    if (!a) return std::nullopt;
    const auto& [softcap, entropy, smoothing, z_loss, shares, importance, ref, kl_coef, entropy_coef, clamp, kl,
                 weighted] = *a;
    return Terms{softcap,
                 entropy,
                 smoothing,
                 z_loss,
                 floats(shares),
                 column(importance),
                 column(ref),
                 column(kl_coef),
                 column(entropy_coef),
                 column(clamp),
                 static_cast<Kl>(kl),
                 weighted};
}

template <class Params>
void run(const Params& params, const std::optional<Terms>& terms, uintptr_t stream) {
    py::gil_scoped_release release;
    launch(params, terms ? &*terms : nullptr, stream);
}

inline void bind(py::module_& m) {
    std::vector<const char*> objectives;  // index in this list = Objective
#define FL_NAME(name) objectives.push_back(#name);
    FL_OBJECTIVES(FL_NAME)
#undef FL_NAME
    m.attr("objectives") = py::cast(objectives);

    m.def("loss_and_grad",
          [](const RowsArg& logits, const RowsArg& grad, int dtype, int64_t vocab, const TargetsArg& t, int objective,
             const std::vector<ColumnArg>& inputs, const ColumnArg& weights, const ColumnArg& temperature,
             const ColumnArg& denominator, bool mean, bool all_logprobs, uintptr_t logprobs, uintptr_t row_losses,
             uintptr_t loss, const TermsArg& terms_arg, uintptr_t stream) {
              run(LossAndGradParams{rows(logits), rows(grad), static_cast<DType>(dtype), vocab,
                                    tokens(t, objective, inputs, weights), column(temperature), column(denominator),
                                    mean, all_logprobs, floats(logprobs), floats(row_losses), floats(loss)},
                  terms(terms_arg), stream);
          });
    m.def("stats", [](const RowsArg& logits, int dtype, int64_t vocab, const TargetsArg& t, const ColumnArg& weights,
                      const ColumnArg& temperature, bool all_logprobs, uintptr_t stats, const TermsArg& terms_arg,
                      uintptr_t stream) {
        run(StatsParams{rows(logits), static_cast<DType>(dtype), vocab, targets(t), column(weights),
                        column(temperature), all_logprobs, floats(stats)},
            terms(terms_arg), stream);
    });
    m.def("objective", [](uintptr_t stats, int64_t n, const TargetsArg& t, int objective,
                          const std::vector<ColumnArg>& inputs, const ColumnArg& weights, const ColumnArg& temperature,
                          const ColumnArg& denominator, bool mean, uintptr_t logprobs, uintptr_t row_losses,
                          uintptr_t coefficients, uintptr_t loss, const TermsArg& terms_arg, uintptr_t stream) {
        run(ObjectiveParams{floats(stats), n, tokens(t, objective, inputs, weights), column(temperature),
                            column(denominator), mean, floats(logprobs), floats(row_losses), floats(coefficients),
                            floats(loss)},
            terms(terms_arg), stream);
    });
    m.def("grad", [](const RowsArg& logits, const RowsArg& grad, int dtype, int64_t vocab, const TargetsArg& t,
                     const ColumnArg& temperature, const ColumnArg& coefficients, const ColumnArg& upstream,
                     uintptr_t stats, const TermsArg& terms_arg, uintptr_t stream) {
        run(GradParams{rows(logits), rows(grad), static_cast<DType>(dtype), vocab, targets(t), column(temperature),
                       column(coefficients), column(upstream), floats(stats)},
            terms(terms_arg), stream);
    });
    m.def("scale", [](const RowsArg& grad, int dtype, int64_t vocab, uintptr_t scale, uintptr_t stream) {
        const ScaleParams params{rows(grad), static_cast<DType>(dtype), vocab, floats(scale)};
        py::gil_scoped_release release;
        launch(params, stream);
    });
}

}  // namespace bindings
}  // namespace fused_losses
