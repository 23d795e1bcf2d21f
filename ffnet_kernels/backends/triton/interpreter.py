"""Patches Triton's interpreter, in which the kernels run on the CPU for tests.

It truncates float32 to bfloat16, where GPUs round to nearest even, a bias that the kernels do not have; and it
multiplies bfloat16 matrices as if their bits were integers.
"""

from __future__ import annotations

import numpy as np


def mend() -> None:
    """Replaces the interpreter's conversions between float32 and bfloat16 and its products of bfloat16; once."""
    import triton.language as tl
    from triton.runtime import interpreter

    converts = getattr(interpreter, "_convert_float", None)
    if converts is None or hasattr(converts, "mended"):
        return

    def convert_float(data, source, target, rounding):
        names = (str(source), str(target))
        if names == ("fp32", "bf16"):
            return to_bfloat16(data)
        if names == ("bf16", "fp32"):
            return data.view(np.uint16).astype(np.uint32) << 16
        return converts(data, source, target, rounding)

    convert_float.mended = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert_float

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return multiply(self, *(self.cast_impl(m, tl.float32) if m.dtype == tl.bfloat16 else m for m in (a, b)), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
