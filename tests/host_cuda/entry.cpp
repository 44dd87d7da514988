// The device code as C functions, one per launch of csrc/launch.h, for structs.py. They return what went wrong, or null.
#include <string>

#include "../../csrc/cuda/device.h"
#include "../../csrc/launch.h"

namespace host_cuda {
bool descending = false;  // of host_cuda.h, which sees other flags than this file does and is not for it
}

namespace {

fused_losses::DeviceLimits limits{2, 1 << 20};

template <class Params>
const char* run(const Params& params) {
    static std::string what;
    try {
        fused_losses::launch(params, 0);
    } catch (const std::exception& error) {
        what = error.what();
        return what.c_str();
    }
    return nullptr;
}

}  // namespace

fused_losses::DeviceLimits fused_losses::device_limits() { return limits; }

#define FL_EXPORT extern "C" __attribute__((visibility("default")))
#define FL_LAUNCH(name, Params)                                                             \
    FL_EXPORT const char* name(const fused_losses::Params* params) { return run(*params); } \
    FL_EXPORT size_t size_of_##name() { return sizeof(fused_losses::Params); }

FL_LAUNCH(loss_and_grad, LossAndGradParams)
FL_LAUNCH(stats, StatsParams)
FL_LAUNCH(objective, ObjectiveParams)
FL_LAUNCH(grad, GradParams)
FL_LAUNCH(scale, ScaleParams)
FL_LAUNCH(normaliser, NormaliserParams)

// Names, by Objective.
FL_EXPORT const char* objectives() {
#define FL_NAME(name, ...) #name " "
    return FL_OBJECTIVES(FL_NAME);
}

FL_EXPORT void configure(int multiprocessors, int64_t l2_bytes, bool descending) {
    limits = {multiprocessors, l2_bytes};
    host_cuda::descending = descending;
}
