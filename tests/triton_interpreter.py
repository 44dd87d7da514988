"""Triton's interpreter truncates float32 to bfloat16 where a GPU rounds to nearest even. Put that right."""

from __future__ import annotations

import numpy as np


def round_to_nearest() -> None:
    """Patch triton.runtime.interpreter; to be called once, with TRITON_INTERPRET=1 set before triton's import."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
            nan = np.isnan(data)  # adding would carry a NaN's payload into the sign
            return np.where(nan, 0x7FC0, rounded).astype(np.uint16).reshape(data.shape)
        if source == tl.bfloat16 and target == tl.float32:  # exact, and faster than the interpreter's
            return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).reshape(data.shape)
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_float
