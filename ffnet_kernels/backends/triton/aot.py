"""Compiles the kernels ahead of time, without a GPU, and reads their resource usage from the machine code.

It compiles exactly what would be launched: the host code runs on ``meta`` tensors, once with each tile that may be
chosen, and its launches are recorded. ``python -m ffnet_kernels aot`` prints the table.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention, configs, depthwise, mixer
from .launch import Launch, options, recording

#: Resources of one multiprocessor, the same on all of them.
REGISTERS = 65536
SHARED = 96 * 1024
#: The occupancy target: resident warps of a kernel on a multiprocessor, or one program if that is larger.
WARPS = 8

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Compiled(NamedTuple):
    """A kernel for an architecture: registers and bytes of stack and local memory a thread, shared bytes a program."""

    kernel: str
    variant: str
    dtype: str
    architecture: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def resident_warps(self) -> int:
        """Warps that fit on a multiprocessor, given registers (allocated eight at a time) and shared memory."""
        threads = 32 * self.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads)
        by_shared = SHARED // self.shared if self.shared else by_registers
        return min(by_registers, by_shared) * self.warps

    def complaint(self) -> str | None:
        """What is wrong with a kernel: spilled registers, or fewer resident warps than targeted."""
        if self.stack or self.local:
            return f"spills: {self.stack} bytes of stack, {self.local} of local memory"
        if self.resident_warps < WARPS and self.resident_warps < self.warps:
            return f"{self.resident_warps} warps fit, {WARPS} are planned"
        return None


def launches(dtypes: Sequence[torch.dtype]) -> Iterator[Launch]:
    """Every kernel with every tile that may be chosen, in both layouts: at FFNet's channel counts and, fewer of them,
    at odd ones, which load element by element. Filters are 7 or 31 rows high (of the fused kernels, 3 and 7): a lower
    one is the same code with fewer rows in registers."""
    seen = set()
    for dtype, last, aligned in itertools.product(dtypes, (True, False), (True, False)):
        for call in _calls(dtype, last, aligned):
            for number in range(4):
                for launch in _record(call, number):
                    key = _key(launch)
                    if key not in seen:
                        seen.add(key)
                        yield launch


def _record(call: Callable[[], Any], number: int) -> list[Launch]:
    """The launches of a call with the n-th candidate tile of each kernel, the last one where there are fewer."""
    with recording() as found, configs.choosing(lambda _, tiles: tiles[min(number, len(tiles) - 1)]):
        call()
    return found


def _calls(dtype: torch.dtype, last: bool, aligned: bool) -> Iterator[Callable[[], Any]]:
    images, channels = 8, 320 if aligned else 17

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def empty_map(channels: int, size: int) -> Tensor:
        layout = torch.channels_last if last else torch.contiguous_format
        return empty(images, channels, size, size).contiguous(memory_format=layout)

    def convolution(size: int, kernel: int, activation="gelu", stride: int = 1, outputs: int = 1) -> Callable[[], Any]:
        x, weight, bias = (
            empty_map(channels, size),
            empty(outputs * channels, 1, kernel, kernel),
            empty(outputs * channels),
        )
        pads, strides = depthwise.same_padding(weight), (stride, stride)
        out = empty_map(outputs * channels, -(-size // stride))

        def call() -> None:
            depthwise.forward(out, x, weight, bias, strides, pads, activation)
            depthwise.backward(out, x, weight, bias, strides, pads, activation, (True, True, True))
            depthwise.backward(out, x, weight, bias, strides, pads, "none", (False, True, True))

        return call

    def token_mixer(size: int, kernel: int) -> Callable[[], Any]:
        x, weight, vector = empty_map(channels, size), empty(channels, 1, kernel, kernel), empty(channels)

        def call() -> None:
            attention.forward(torch.empty_like(x), x, weight, vector, weight, vector, "gelu", vector, x)
            attention.backward(x, x, weight, vector, weight, vector, "gelu", vector, x, (True,) * 7)

        return call

    def channel_mixer(width: int) -> Callable[[], Any]:
        x, weight, expand, vector = empty_map(width, 8), empty(width, 1, 3, 3), empty(3 * width, width), empty(width)
        hidden, project = empty(3 * width), empty(width, 3 * width)
        args = (x, weight, vector, expand, hidden, project, vector, "gelu", vector, x)

        def call() -> None:
            mixer.forward(torch.empty_like(x), *args)
            mixer.backward(x, *args, (True,) * 9)

        return call

    if not aligned:
        yield from (convolution(16, 7), token_mixer(16, 7), token_mixer(64, 3), channel_mixer(17), channel_mixer(149))
        return
    for size in (8, 16, 24, 64):
        yield convolution(size, 7)
        yield convolution(size, 31, activation="none")
        yield token_mixer(size, 3)
        yield token_mixer(size, 7)
    yield convolution(4, 7, activation="none")
    yield convolution(16, 7, activation="none", stride=2, outputs=2)
    for width in (40, 80, 128, 320):
        yield channel_mixer(width)


def _key(launch: Launch) -> tuple:
    """Cache key of a compiled kernel: constants, dtypes, which arguments are None and which strides are 1."""

    def describe(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        if isinstance(value, tuple):
            return tuple(stride in (1, None) for stride in value)
        return value if name.isupper() or value is None else None

    return launch.kernel.__name__, launch.warps, *(describe(*argument) for argument in launch.arguments.items())


def source_of(launch: Launch) -> ASTSource:
    """The kernel specialised as Triton does at a launch: strides of 1 and multiples of 16, aligned pointers, None."""
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in kernel.params:
        value, path = launch.arguments[parameter.name], (parameter.num,)
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[path] = value
        else:
            generic = parameter.do_not_specialize
            signature[parameter.name] = _specialise(value, path, constants, attributes, generic)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _specialise(value: Any, path: tuple[int, ...], constants: dict, attributes: dict, generic: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), constants, attributes, generic) for i, v in enumerate(value))
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return f"*{_TYPES[value.dtype]}"
    if value is None or (value == 1 and not generic):
        constants[path] = value
        return "constexpr"
    if value % 16 == 0 and not generic:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, architecture: int) -> tuple[Compiled, bytes]:
    """The kernel's resource usage on an NVIDIA architecture (90 is sm_90), and its machine code."""
    chosen = options(launch.warps, launch.stages, nvidia=True)
    compiled = triton.compile(source_of(launch), target=GPUTarget("cuda", architecture, 32), options=chosen)
    code = compiled.asm["cubin"]
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", cuobjdump(code, "--dump-resource-usage"))
    used = {name: int(number) for name, number in found}
    first = next(v for v in launch.arguments.values() if isinstance(v, Tensor))
    return Compiled(
        launch.kernel.__name__, _variant(launch.arguments), _TYPES[first.dtype], architecture, launch.warps,
        used["REG"], used["STACK"], used["LOCAL"], compiled.metadata.shared,
    ), code  # fmt: skip


def _variant(arguments: dict[str, Any]) -> str:
    numbers = [f"{name}={value}" for name, value in arguments.items() if name in _VARIANT]
    maps = [value for name, value in arguments.items() if name.endswith("_strides") and len(value or ()) == 4]
    if maps:
        last = arguments["MAP_UNIT"] == 1 if arguments["ALIGN"] > 1 else maps[0][1] == 1
        numbers.append("channels-last" if last else "NCHW")
    extras = [name for name in ("residual", "grad_scale") if arguments.get(name) is not None]
    return " ".join([*numbers, *extras])


_VARIANT = (
    "BLOCK_W", "BLOCK_C", "ROWS", "BLOCK_P", "BLOCK_O", "BLOCK_K", "BLOCK_H", "TAPS", "CHUNKED", "HALO", "STRIDE_H",
    "OUTPUTS", "INPUTS", "ACTIVATION", "DERIVATIVE", "ALIGN",
)  # fmt: skip


def cuobjdump(code: bytes, option: str) -> str:
    """The output of NVIDIA's cuobjdump, which ships with Triton, for a piece of machine code."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([str(program), option, file.name], capture_output=True, text=True, check=True).stdout


def _compile_numbered(job: tuple[tuple[torch.dtype, ...], int, int]) -> Compiled:
    dtypes, number, architecture = job
    return compile_launch(_all_launches(dtypes)[number], architecture)[0]


_found: dict[tuple[torch.dtype, ...], list[Launch]] = {}


def _all_launches(dtypes: tuple[torch.dtype, ...]) -> list[Launch]:
    if dtypes not in _found:
        _found[dtypes] = list(launches(dtypes))
    return _found[dtypes]


def survey(
    dtypes: Sequence[torch.dtype], architectures: Sequence[int], report: Callable[[Compiled], None] | None = None
) -> list[Compiled]:
    """Compiles every launch for every architecture, on all processors; ``report`` is called with each."""
    chosen = tuple(dtypes)
    jobs = [(chosen, i, arch) for arch in architectures for i in range(len(_all_launches(chosen)))]
    results = []
    context = multiprocessing.get_context("fork")  # the recorded launches need not be pickled
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for compiled in pool.map(_compile_numbered, jobs, chunksize=4):
            results.append(compiled)
            if report:
                report(compiled)
    return results


def table(rows: Sequence[Compiled]) -> str:
    """In Markdown: registers a thread and warps a multiprocessor holds, a column for each architecture."""
    architectures = sorted({row.architecture for row in rows})
    found: dict[tuple, dict[int, Compiled]] = {}
    for row in rows:
        found.setdefault((row.kernel, row.dtype, row.variant, row.warps), {})[row.architecture] = row
    lines = ["| kernel | dtype | variant | warps |" + "".join(f" sm_{a} |" for a in architectures)]
    lines.append("|---|---|---|--:|" + "--:|" * len(architectures))
    for (kernel, dtype, variant, warps), by_architecture in sorted(found.items()):
        cells = []
        for architecture in architectures:
            one = by_architecture.get(architecture)
            cells.append("–" if one is None else one.complaint() or f"{one.registers} ({one.resident_warps})")
        lines.append(f"| `{kernel}` | {dtype} | {variant} | {warps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(dtypes: Sequence[str], architectures: Sequence[int]) -> int:
    """Compiles, prints the table and what is wrong; returns 1 if anything is."""
    chosen = [dtype for dtype, name in _TYPES.items() if name in dtypes]
    rows = survey(chosen, architectures)
    complaints = [f"{row.kernel} ({row.variant}, {row.dtype}, sm_{row.architecture}): {row.complaint()}"
                  for row in rows if row.complaint()]  # fmt: skip
    print(f"Registers a thread (resident warps a multiprocessor); no kernel may spill:\n\n{table(rows)}\n")
    print("\n".join([*complaints, f"{len(rows)} kernels compiled, {len(complaints)} complaints"]))
    return int(bool(complaints))
