// The device code and its launches in one unit, for the CPU, with what a test sets and asks of the stand-ins.
#define FL_CUDA_ARCHITECTURES "80;90a;100"
#include "cuda/device.cu"
#include "cuda/launch.cu"

namespace host_cuda {
bool descending = false;
Runtime runtime;
}  // namespace host_cuda

#define FL_EXPORT extern "C" __attribute__((visibility("default")))

// Adds a device and makes it the current one: what is known of a device is kept.
FL_EXPORT void add_device(int multiprocessors, int l2_bytes, int of_block, int of_multiprocessor, int major, int minor) {
    auto& runtime = host_cuda::runtime;
    runtime.devices.push_back({multiprocessors, l2_bytes, major, minor, of_block, of_multiprocessor});
    runtime.current = static_cast<int>(runtime.devices.size()) - 1;
}
FL_EXPORT void set_descending(int descending) { host_cuda::descending = descending; }

// One pass on chip, in this shape: the launch itself would choose another.
FL_EXPORT const char* on_chip(const fused_losses::LossAndGradParams* params, int threads, int chunks, int announced,
                              int team) {
    using namespace fused_losses;
    static std::string what;
    try {
        const auto& p = *params;
        if (p.logits.n > 0)
            for_type_and_row(p.logits.dtype, p.problem.plain, p.problem.transform, [&](auto element, auto kind) {
                using Row = typename decltype(kind)::Row;
                device_limits();
                start_on_chip<decltype(element), Row>(p, {threads, 1, chunks, team}, announced, 0);
            });
        start_sum(total_kernel, 0, TotalParams{p.logits.n, p.row_losses, p.problem.denominator, p.loss});
    } catch (const std::exception& error) {
        what = error.what();
        return what.c_str();
    }
    return nullptr;
}
FL_EXPORT int64_t copies_asked() { return host_cuda::copies.asked; }
FL_EXPORT void set_counting(int on) { host_cuda::stores.count(on != 0); }
FL_EXPORT int64_t lines_stored() { return host_cuda::stores.lines(); }

// ---- The runtime ----------------------------------------------------------------------------------------------------

FL_EXPORT void set_versions(int driver, int version) {
    host_cuda::runtime.driver = driver;
    host_cuda::runtime.version = version;
}
FL_EXPORT void set_code(int architecture) { host_cuda::runtime.code = architecture; }
FL_EXPORT void set_current(int device) { host_cuda::runtime.current = device; }
FL_EXPORT int current() { return host_cuda::runtime.current; }
FL_EXPORT void set_error(const char* call, int error) {
    if (error)
        host_cuda::runtime.errors[call] = static_cast<cudaError_t>(error);
    else
        host_cuda::runtime.errors.erase(call);
}
FL_EXPORT void set_runs(int runs) { host_cuda::runtime.runs = runs; }
FL_EXPORT int calls(const char* name) { return host_cuda::runtime.calls[name]; }
FL_EXPORT int last_error() { return host_cuda::runtime.last; }
FL_EXPORT const char* unusable(int index) {
    static std::string what;
    return (what = fused_losses::unusable(index)).c_str();
}
// "device blocks threads bytes stream team on_chip" of every launch since it was last asked.
FL_EXPORT const char* launches() {
    static std::string out;
    out.clear();
    auto& runtime = host_cuda::runtime;
    for (const auto& launch : runtime.launches) {
        const bool on_chip = runtime.allowed.count({launch.device, launch.kernel}) > 0;
        for (const int64_t x : {int64_t{launch.device}, int64_t{launch.blocks}, int64_t{launch.threads},
                                int64_t{launch.shared_bytes}, reinterpret_cast<int64_t>(launch.stream),
                                int64_t{launch.together}, int64_t{on_chip}})
            out += std::to_string(x) + " ";
        out += "\n";
    }
    runtime.launches.clear();
    return out.c_str();
}
