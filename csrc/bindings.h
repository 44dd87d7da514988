// The Python face of a backend: the records of fused_losses/problem.py, read by name, and tensors, read through DLPack.
// The CPU and the CUDA module offer the same five functions. What does not fit raises before anything is launched.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "dlpack.h"
#include "launch.h"

namespace fused_losses {
namespace bindings {

namespace py = pybind11;

// ---- What a module knows of the Python side ------------------------------------------------------------------------

// clang-format off
#define FL_NAMES(apply)                                                                                             \
    apply(logits) apply(gradient) apply(stats) apply(coefficients) apply(logprobs) apply(row_losses) apply(loss)    \
    apply(upstream) apply(table)                                                                                    \
    apply(targets) apply(tokens) apply(ignore_index) apply(shares)                                                  \
    apply(transform) apply(temperature) apply(softcap)                                                              \
    apply(weights) apply(plain) apply(objective) apply(name) apply(inputs) apply(denominator) apply(vocab) apply(all_logprobs)   \
    apply(terms) apply(importance_weights) apply(ref_logprobs) apply(kl_coef) apply(entropy_coef)                   \
    apply(log_ratio_clamp) apply(label_smoothing) apply(z_loss) apply(kl_type) apply(kl_weighted_by_ratio)          \
    apply(entropy) apply(statistics)
// clang-format on

struct Objectives {
    const char* name;
    const char* inputs;  // "old_logprobs, advantages"

    constexpr Py_ssize_t num_inputs() const {
        Py_ssize_t num = *inputs ? 1 : 0;
        for (const char* c = inputs; *c; ++c) num += *c == ',';
        return num;
    }
};

constexpr Objectives kObjectives[] = {// by Objective
#define FL_INPUTS(name, ...) {#name, #__VA_ARGS__},
                                      FL_OBJECTIVES(FL_INPUTS)
#undef FL_INPUTS
};

constexpr bool inputs_fit() {
    for (const Objectives& objective : kObjectives)
        if (objective.num_inputs() > kMaxInputs) return false;
    return true;
}
static_assert(inputs_fit(), "kMaxInputs of objectives.h is too small");

// Made once, when the module is imported.
struct Python {
    // interned, so that looking a field up compares pointers
#define FL_NAME(field) PyObject* const field = PyUnicode_InternFromString(#field);
    FL_NAMES(FL_NAME)
#undef FL_NAME
    py::dict objective_ids, kl_ids;  // name: its number in C++
    PyObject* tensor_type;
    int (*tensor_from_object)(void*, dlpack::Tensor*);
    dlpack::DeviceType device_type;

    explicit Python(dlpack::DeviceType type) : device_type(type) {
        for (const Objectives& objective : kObjectives)
            objective_ids[objective.name] = static_cast<int>(&objective - kObjectives);
        kl_ids["k1"] = static_cast<int>(Kl::k1);
        kl_ids["k2"] = static_cast<int>(Kl::k2);
        kl_ids["k3"] = static_cast<int>(Kl::k3);
        kl_ids["abs"] = static_cast<int>(Kl::abs);
        const py::object tensor = py::module_::import("torch").attr("Tensor");
        const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
        const auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
        while (api && api->major > dlpack::kMajor) api = api->previous;
        if (!api || api->major != dlpack::kMajor || !api->tensor_from_object)
            throw py::import_error("torch has another version of DLPack");
        tensor_type = tensor.ptr();
        tensor_from_object = api->tensor_from_object;
    }
};

inline const Python*& python_slot() {
    static const Python* python = nullptr;
    return python;
}
inline const Python& python() { return *python_slot(); }

// ---- Fields and numbers --------------------------------------------------------------------------------------------

// `name` is for the message, wherever it goes along.
[[noreturn]] inline void refuse(PyObject* name, const std::string& what) {
    throw py::value_error(std::string(py::str(name)) + " " + what);
}
[[noreturn]] inline void refuse_type(PyObject* object, PyObject* name, const char* takes) {
    throw py::type_error(std::string(py::str(name)) + " must be " + takes + ", not " + Py_TYPE(object)->tp_name);
}

// What a record holds, and so keeps alive through the call; not what a property makes.
inline PyObject* field(PyObject* record, PyObject* name) {
    PyObject* value = PyObject_GetAttr(record, name);
    if (!value) throw py::error_already_set();
    const bool held = Py_REFCNT(value) > 1;
    Py_DECREF(value);
    if (!held) refuse(name, "must be a field of its record");
    return value;
}

inline bool is_number(PyObject* object) { return PyFloat_Check(object) || PyLong_Check(object); }

inline float number(PyObject* object, PyObject* name) {
    if (!is_number(object)) refuse_type(object, name, "a number");
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<float>(value);
}

inline int64_t integer(PyObject* object, PyObject* name) {
    if (!PyLong_Check(object)) refuse_type(object, name, "an int");
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

inline bool flag(PyObject* object) {
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) throw py::error_already_set();
    return truth != 0;
}

inline int id_in(const py::dict& ids, PyObject* key, PyObject* name) {
    PyObject* id = PyDict_GetItemWithError(ids.ptr(), key);
    if (!id && PyErr_Occurred()) throw py::error_already_set();
    if (!id) refuse(name, "is " + std::string(py::repr(key)) + ", which this module does not have");
    return static_cast<int>(PyLong_AsLong(id));
}

// ---- Tensors -------------------------------------------------------------------------------------------------------

inline int64_t elements(const dlpack::Tensor& t) {
    int64_t product = 1;
    for (int i = 0; i < t.ndim; ++i) product *= t.shape[i];
    return product;
}

inline dlpack::Tensor tensor(PyObject* object, PyObject* name) {
    if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(python().tensor_type)))
        refuse_type(object, name, "a tensor");
    dlpack::Tensor out;
    if (python().tensor_from_object(object, &out) != 0) throw py::error_already_set();
    if (out.device_type != python().device_type) refuse(name, "is on a device that this backend does not run on");
    if (!out.data && elements(out) > 0) refuse(name, "has no memory");  // a subclass that wraps other tensors
    out.data = static_cast<char*>(out.data) + out.byte_offset;
    return out;
}

inline bool is(const dlpack::Tensor& t, dlpack::TypeCode code, int bits) {
    return t.dtype.code == code && t.dtype.bits == bits;
}

inline bool contiguous(const dlpack::Tensor& t) {
    if (elements(t) == 0) return true;
    int64_t stride = 1;
    for (int i = t.ndim; i-- > 0; stride *= t.shape[i])
        if (t.shape[i] > 1 && t.strides[i] != stride) return false;
    return true;
}

inline float* floats(PyObject* object, int64_t size, PyObject* name) {
    const dlpack::Tensor t = tensor(object, name);
    if (!is(t, dlpack::kFloat, 32) || !contiguous(t)) refuse(name, "must be contiguous float32");
    if (elements(t) != size)
        refuse(name, "has " + std::to_string(elements(t)) + " elements, not " + std::to_string(size));
    return static_cast<float*>(t.data);
}

inline Rows matrix(PyObject* object, PyObject* name) {
    const dlpack::Tensor t = tensor(object, name);
    Rows rows;
    rows.data = t.data;
    if (is(t, dlpack::kFloat, 32)) {
        rows.dtype = DType::float32;
    } else if (is(t, dlpack::kBfloat, 16)) {
        rows.dtype = DType::bfloat16;
    } else if (is(t, dlpack::kFloat, 16)) {
        rows.dtype = DType::float16;
    } else {
        refuse(name, "must be float32, bfloat16 or float16");
    }
    if (t.ndim < 1 || t.ndim > 3) refuse(name, "must have 1 to 3 dimensions, not " + std::to_string(t.ndim));
    rows.vocab = t.shape[t.ndim - 1];
    if (rows.vocab > 1 && t.strides[t.ndim - 1] != 1) refuse(name, "must have a contiguous last dimension");
    const int64_t outer = t.ndim == 3 ? t.shape[0] : 1, inner = t.ndim >= 2 ? t.shape[t.ndim - 2] : 1;
    const int64_t outer_stride = t.ndim == 3 ? t.strides[0] : 0, inner_stride = t.ndim >= 2 ? t.strides[t.ndim - 2] : 0;
    rows.n = outer * inner;
    if (inner == 1) {  // one stride where there is one
        rows.inner = std::max<int64_t>(rows.n, 1), rows.outer_stride = 0, rows.inner_stride = outer_stride;
    } else if (outer == 1 || outer_stride == inner * inner_stride) {
        rows.inner = std::max<int64_t>(rows.n, 1), rows.outer_stride = 0, rows.inner_stride = inner_stride;
    } else {
        rows.inner = std::max<int64_t>(inner, 1), rows.outer_stride = outer_stride, rows.inner_stride = inner_stride;
    }
    return rows;
}

inline Rows gradient_of(const Rows& logits, PyObject* object) {
    const Rows rows = matrix(object, python().gradient);
    if (rows.n != logits.n || rows.vocab != logits.vocab || rows.dtype != logits.dtype)
        refuse(python().gradient, "must have the shape and the dtype of the logits");
    return rows;
}

inline Column column(PyObject* object, int64_t n, PyObject* name) {
    if (is_number(object)) return {nullptr, 0, number(object, name)};
    const dlpack::Tensor t = tensor(object, name);
    if (!is(t, dlpack::kFloat, 32)) refuse(name, "must be float32");
    if (t.ndim > 1 || (t.ndim == 1 && t.shape[0] != n)) refuse(name, "must be a number or one per token");
    return {static_cast<const float*>(t.data), t.ndim ? t.strides[0] : 0, 0.f};
}

inline Column column_of(PyObject* record, int64_t n, PyObject* name) { return column(field(record, name), n, name); }

// ---- Records -------------------------------------------------------------------------------------------------------

inline Targets targets(PyObject* record, int64_t n) {
    const Python& py = python();
    const dlpack::Tensor tokens = tensor(field(record, py.tokens), py.tokens);
    PyObject* shares = field(record, py.shares);
    const bool several = shares != Py_None;
    Targets out;
    out.data = tokens.data;
    out.is_int64 = is(tokens, dlpack::kInt, 64);
    if (!(out.is_int64 || is(tokens, dlpack::kInt, 32)) || !contiguous(tokens))
        refuse(py.tokens, "must be contiguous int64 or int32");
    if (tokens.ndim != (several ? 2 : 1)) refuse(py.tokens, several ? "must be (N, K)" : "must be (N,)");
    if (tokens.shape[0] != n) refuse(py.tokens, "must have a target for each row of the logits");
    out.num = several ? tokens.shape[1] : 1;
    out.ignore_index = integer(field(record, py.ignore_index), py.ignore_index);
    out.shares = several ? floats(shares, n * out.num, py.shares) : nullptr;
    return out;
}

inline Transform transform(PyObject* record, int64_t n) {
    const Python& py = python();
    PyObject* softcap = field(record, py.softcap);
    return {column_of(record, n, py.temperature), softcap == Py_None ? 0.f : number(softcap, py.softcap)};
}

inline Terms terms(PyObject* record, int64_t n) {
    const Python& py = python();
    PyObject* kl_type = field(record, py.kl_type);
    Terms out;
    out.importance_weights = column_of(record, n, py.importance_weights);
    out.ref_logprobs = column_of(record, n, py.ref_logprobs);
    out.kl_coef = column_of(record, n, py.kl_coef);
    out.entropy_coef = column_of(record, n, py.entropy_coef);
    out.log_ratio_clamp = column_of(record, n, py.log_ratio_clamp);
    out.label_smoothing = number(field(record, py.label_smoothing), py.label_smoothing);
    out.z_loss = number(field(record, py.z_loss), py.z_loss);
    out.kl_type = kl_type == Py_None ? Kl::none : static_cast<Kl>(id_in(py.kl_ids, kl_type, py.kl_type));
    out.kl_weighted_by_ratio = flag(field(record, py.kl_weighted_by_ratio));
    out.entropy = flag(field(record, py.entropy));
    out.statistics = flag(field(record, py.statistics));
    return out;
}

// loss: where the loss will be, if it is to be divided. Until then a mean's normaliser is there: the loss is written by
// whoever reads its denominator last.
inline Problem problem(PyObject* record, int64_t n, const float* loss = nullptr) {
    const Python& py = python();
    Problem out;
    out.targets = targets(field(record, py.targets), n);
    out.transform = transform(field(record, py.transform), n);
    out.weights = column_of(record, n, py.weights);
    const int objective = id_in(py.objective_ids, field(field(record, py.objective), py.name), py.objective);
    out.objective = static_cast<Objective>(objective);
    PyObject* inputs = field(record, py.inputs);
    if (!PyTuple_Check(inputs) || PyTuple_GET_SIZE(inputs) != kObjectives[objective].num_inputs())
        refuse(py.inputs, std::string("must be a tuple of ") + kObjectives[objective].inputs);
    for (Py_ssize_t i = 0; i < kMaxInputs; ++i)
        out.inputs[i] = i < PyTuple_GET_SIZE(inputs) ? column(PyTuple_GET_ITEM(inputs, i), n, py.inputs) : Column{};
    out.terms = terms(field(record, py.terms), n);
    if (out.terms.statistics && !out.targets.single()) refuse(py.statistics, "are of one target per token");
    PyObject* denominator = field(record, py.denominator);
    out.denominator = denominator == Py_None ? Column{loss, 0, 1.f} : column(denominator, n, py.denominator);
    out.vocab = integer(field(record, py.vocab), py.vocab);
    out.all_logprobs = flag(field(record, py.all_logprobs));
    out.plain = flag(field(record, py.plain));
    return out;
}

inline bool averages(const Problem& problem, const float* loss) { return loss && problem.denominator.data == loss; }

inline LogprobsTable logprobs(PyObject* object, const Problem& problem, int64_t n) {
    return {floats(object, problem.logprobs_rows() * n, python().logprobs), n, problem.targets.num};
}

template <class Float>
StatsTable<Float> stats(PyObject* record, int64_t rows, int64_t num, int64_t n) {
    return {floats(field(record, python().table), rows * n, python().stats), n, num};
}

template <class Float>
CoefficientsTable<Float> coefficients(PyObject* record, bool plain, int64_t n) {
    PyObject* table = field(record, python().table);
    return {floats(table, (plain ? 1 : 4) * n, python().coefficients), n};
}

inline bool has_one_row(PyObject* coefficients_table) {
    const dlpack::Tensor t = tensor(coefficients_table, python().coefficients);
    return t.ndim == 2 && t.shape[0] == 1;
}

inline int64_t tokens_of(PyObject* problem) {
    const Python& py = python();
    const dlpack::Tensor tokens = tensor(field(field(problem, py.targets), py.tokens), py.tokens);
    return tokens.ndim ? tokens.shape[0] : 0;
}

// ---- The five functions --------------------------------------------------------------------------------------------

template <class Params>
void run(const Params& params, uintptr_t stream) {
    py::gil_scoped_release release;
    launch(params, stream);
}

inline void bind(py::module_& m, dlpack::DeviceType device_type) {
    python_slot() = new Python(device_type);

    // {name: the names of its inputs}: compared with fused_losses/objectives.py
    py::dict objectives;
    for (const Objectives& objective : kObjectives) objectives[objective.name] = objective.inputs;
    m.attr("objectives") = objectives;

    m.def("loss_and_grad", [](py::handle logits_arg, py::handle gradient, py::handle record, py::handle logprobs_arg,
                              py::handle row_losses, py::handle loss, uintptr_t stream) {
        const Rows logits = matrix(logits_arg.ptr(), python().logits);
        float* const into = floats(loss.ptr(), 1, python().loss);
        const Problem asked = problem(record.ptr(), logits.n, into);
        run(LossAndGradParams{logits, gradient_of(logits, gradient.ptr()), asked,
                              logprobs(logprobs_arg.ptr(), asked, logits.n),
                              floats(row_losses.ptr(), logits.n, python().row_losses), into, averages(asked, into)},
            stream);
    });
    m.def("stats", [](py::handle logits_arg, py::handle record, py::handle stats_arg, uintptr_t stream) {
        const Rows logits = matrix(logits_arg.ptr(), python().logits);
        const Problem asked = problem(record.ptr(), logits.n);
        run(StatsParams{logits, asked, stats<float>(stats_arg.ptr(), asked.stats_rows(), asked.targets.num, logits.n)},
            stream);
    });
    m.def("objective", [](py::handle stats_arg, py::handle record, py::handle logprobs_arg, py::handle row_losses,
                          py::handle coefficients_arg, py::handle loss, uintptr_t stream) {
        const int64_t n = tokens_of(record.ptr());
        float* const into = loss.is_none() ? nullptr : floats(loss.ptr(), 1, python().loss);
        const Problem asked = problem(record.ptr(), n, into);
        run(ObjectiveParams{n, asked, stats<const float>(stats_arg.ptr(), asked.stats_rows(), asked.targets.num, n),
                            logprobs(logprobs_arg.ptr(), asked, n), floats(row_losses.ptr(), n, python().row_losses),
                            coefficients<float>(coefficients_arg.ptr(), asked.plain, n), into, averages(asked, into)},
            stream);
    });
    m.def("grad", [](py::handle logits_arg, py::handle gradient, py::handle targets_arg, py::handle transform_arg,
                     py::handle stats_arg, py::handle coefficients_arg, py::handle upstream, uintptr_t stream) {
        const Rows logits = matrix(logits_arg.ptr(), python().logits);
        const Targets asked = targets(targets_arg.ptr(), logits.n);
        const bool plain = has_one_row(field(coefficients_arg.ptr(), python().table));
        run(GradParams{logits, gradient_of(logits, gradient.ptr()), asked, transform(transform_arg.ptr(), logits.n),
                       stats<const float>(stats_arg.ptr(), plain ? 3 : asked.num + 4, asked.num, logits.n),
                       coefficients<const float>(coefficients_arg.ptr(), plain, logits.n),
                       column(upstream.ptr(), logits.n, python().upstream), plain},
            stream);
    });
    m.def("scale", [](py::handle gradient, py::handle upstream, uintptr_t stream) {
        run(ScaleParams{matrix(gradient.ptr(), python().gradient), floats(upstream.ptr(), 1, python().upstream)},
            stream);
    });
}

}  // namespace bindings
}  // namespace fused_losses
