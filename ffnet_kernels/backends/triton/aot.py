"""Compiles the kernels ahead of time, without a GPU, and reads from the machine code what they take of one.

What is compiled is what would be launched: the host code runs on tensors of the device ``meta`` and its launches are
recorded. ``python -m ffnet_kernels aot`` prints the table.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

ARCHITECTURES = (80, 90, 100)
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Resources(NamedTuple):
    """Of a compiled kernel: registers a thread, bytes of stack and spilled local memory a thread, shared memory."""

    registers: int
    stack: int
    local: int
    shared: int


def source_of(launch: Launch) -> ASTSource:
    """The kernel specialised as Triton does at a launch: strides of 1 and multiples of 16, aligned pointers, None."""
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(parameter.num,)] = value
        else:
            path = (parameter.num,)
            signature[parameter.name] = _specialise(value, path, constants, attributes, parameter.do_not_specialize)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _specialise(value: Any, path: tuple[int, ...], constants: dict, attributes: dict, generic: bool) -> Any:
    if value is None or (isinstance(value, int) and value == 1 and not generic):
        constants[path] = value
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), constants, attributes, generic) for i, v in enumerate(value))
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return f"*{_TYPES[value.dtype]}"
    if value % 16 == 0 and not generic:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, architecture: int) -> tuple[Resources, bytes]:
    """Resources and machine code for an NVIDIA architecture (90 is sm_90)."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source_of(launch), target=GPUTarget("cuda", architecture, 32), options=options)
    code = compiled.asm["cubin"]
    return read_resources(code), code


def read_resources(code: bytes) -> Resources:
    text = _cuobjdump(code, "--dump-resource-usage")
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"])


def _cuobjdump(code: bytes, option: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([str(program), option, file.name], capture_output=True, text=True, check=True).stdout
