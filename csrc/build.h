// Which sources a module was compiled from, and how: python -m fused_losses says so. setup.py defines FL_COMMIT, which
// is empty where no repository and no source distribution told it, and FL_FLAGS.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_losses {
namespace bindings {

inline pybind11::dict build() {
    pybind11::dict build;
    build["commit"] = FL_COMMIT;
#if defined(__clang__)
    build["compiler"] = "Clang " __clang_version__;
#elif defined(__GNUC__)
    build["compiler"] = "GCC " __VERSION__;
#else
#error "fused_losses is compiled by GCC or Clang"
#endif
    build["flags"] = FL_FLAGS;
    return build;
}

}  // namespace bindings
}  // namespace fused_losses
