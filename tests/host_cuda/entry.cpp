// The device code as C functions, one per launch of csrc/launch.h, for structs.py. They return what went wrong, or null.
#include <string>

#include "../../csrc/launch.h"

namespace {

template <class Params>
const char* run(const Params& params, uintptr_t stream) {
    static std::string what;
    try {
        fused_losses::launch(params, stream);
    } catch (const std::exception& error) {
        what = error.what();
        return what.c_str();
    }
    return nullptr;
}

}  // namespace

#define FL_EXPORT extern "C" __attribute__((visibility("default")))
#define FL_LAUNCH(name, Params)                                             \
    FL_EXPORT const char* name(const fused_losses::Params* params, uintptr_t stream) { return run(*params, stream); } \
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
