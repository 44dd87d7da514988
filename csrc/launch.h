// What a backend offers: one launch per stage. The CPU and the CUDA module define the same six.
#pragma once

#include "problem.h"

namespace fused_losses {

// Throw std::runtime_error when the work could not be started, and on CPU std::invalid_argument for a target outside
// [0, V). stream: a cudaStream_t; 0 and unused on CPU.
void launch(const LossAndGradParams&, uintptr_t stream);
void launch(const StatsParams&, uintptr_t stream);
void launch(const ObjectiveParams&, uintptr_t stream);
void launch(const GradParams&, uintptr_t stream);
void launch(const ScaleParams&, uintptr_t stream);
void launch(const NormaliserParams&, uintptr_t stream);

}  // namespace fused_losses
