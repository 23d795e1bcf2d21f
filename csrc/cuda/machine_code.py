"""Registers and instruction counts of CUDA kernels, from their machine code as cuobjdump prints it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Columns of the counts, and the instructions in each. `shared_clocks` is no class: it weighs those of shared memory.
CLASSES = {
    "hmma_k16": ("HMMA.16816",),
    "hmma_k8": ("HMMA.1688",),
    "global_load": ("LDG", "LDGSTS"),
    "global_store": ("STG",),
    "shared_load": ("LDS", "LDSM"),
    "shared_store": ("STS", "STSM"),
    "shuffle": ("SHFL",),
    "mufu": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"),
    "local": ("LDL", "STL"),
}
COUNTS = ("total", *CLASSES, "other", "shared_clocks")
RESOURCES = ("registers", "stack", "shared")


@dataclass
class Instruction:
    address: int
    name: str  # with its modifiers
    operands: str
    conditional: bool

    def pads(self) -> bool:
        """Whether it only fills the space behind a kernel's end."""
        return self.name == "NOP" or (self.name == "BRA" and self.operands == f"{self.address:#x}")

    def column(self) -> str:
        base = self.name.split(".")[0]
        for column, names in CLASSES.items():
            if base in names or any("." in name and self.name.startswith(name) for name in names):
                return column
        return "other"

    def shared_clocks(self) -> int:
        """A clock for every 128 bytes that a warp moves, without bank conflicts."""
        base, *modifiers = self.name.split(".")
        if base == "SHFL":
            return 1
        if base in ("LDSM", "STSM"):
            return next((int(m) for m in modifiers if m in ("2", "4")), 1)
        if base in ("LDS", "STS", "LDGSTS"):
            return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
        return 0

    def backward_target(self) -> int | None:
        if self.name.split(".")[0] != "BRA" or not (target := re.search(r"0x([0-9a-f]+)\s*$", self.operands)):
            return None
        address = int(target[1], 16)
        return address if address < self.address else None


def count(instructions: list[Instruction]) -> list[int]:
    totals = dict.fromkeys(COUNTS, 0)
    for instruction in instructions:
        totals["total"] += 1
        totals[instruction.column()] += 1
        totals["shared_clocks"] += instruction.shared_clocks()
    return list(totals.values())


def main_loop(instructions: list[Instruction]) -> list[Instruction] | None:
    """The body of the smallest loop with at least half the arithmetic of the one with the most.

    Arithmetic is HMMA, without any of it FP32, else every instruction. A branch back across an unconditional EXIT is
    the return from a rare path behind the kernel's end, not a loop.
    """
    exits = [i.address for i in instructions if i.name == "EXIT" and not i.conditional]
    loops = []
    for last in instructions:
        first = last.backward_target()
        if first is not None and not any(first <= address < last.address for address in exits):
            loops.append([i for i in instructions if first <= i.address <= last.address])
    for columns in ({"hmma_k16", "hmma_k8"}, {"fp32"}, {*CLASSES, "other"}):
        weights = [sum(i.column() in columns for i in body) for body in loops]
        if any(weights):
            return min((b for b, w in zip(loops, weights, strict=True) if 2 * w >= max(weights)), key=len)
    return None


@dataclass
class Kernel:
    resources: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    loop: list[int] | None = None

    def row(self) -> list:
        return [*self.resources, self.counts, self.loop]


def find_cuobjdump() -> str:
    places = [f"{home}/bin/cuobjdump" for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    places += [shutil.which("cuobjdump") or "", "/usr/local/cuda/bin/cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    found = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if found is None:
        sys.exit("no cuobjdump (looked in $CUDA_HOME/bin, on the path, in /usr/local/cuda/bin and in triton's package)")
    return found


def dump(option: str, library: Path) -> Iterator[str]:
    with subprocess.Popen([find_cuobjdump(), option, str(library)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        sys.exit(f"cuobjdump {option} {library} failed")


def collect(library: Path) -> dict[str, dict[str, list]]:
    """{kernel: {architecture: [registers, stack, shared, counts, counts of the main loop or None]}}"""
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = name = ""
    for line in dump("-res-usage", library):
        if found := re.match(r"arch = sm_(\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (.+):$", line):
            name = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            kernels[name, architecture] = Kernel([registers, max(stack, local), shared])
    instructions: list[Instruction] = []

    def close() -> None:
        while instructions and instructions[-1].pads():
            instructions.pop()
        if instructions:
            kernel = kernels[name, architecture]
            kernel.counts, body = count(instructions), main_loop(instructions)
            kernel.loop = count(body) if body else None
            instructions.clear()

    for line in dump("-sass", library):
        if found := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@\S+\s+)?([A-Z][\w.]*)(.*?);", line):
            address, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(int(address, 16), opcode, operands.strip(), bool(predicate)))
        elif found := re.match(r"\s+Function : (\S+)", line):
            close()
            name = found[1]
        elif found := re.match(r"arch = sm_(\w+)", line):
            close()
            architecture = found[1]
    close()
    if not kernels:
        sys.exit(f"{library} has no kernels")
    readable = readable_names({name for name, _ in kernels})
    result: dict[str, dict[str, list]] = {name: {} for name in sorted(readable.values())}
    for (name, architecture), kernel in sorted(kernels.items(), key=lambda item: int(re.sub(r"\D", "", item[0][1]))):
        result[readable[name]][architecture] = kernel.row()
    return result


def readable_names(mangled: set[str]) -> dict[str, str]:
    """Names as in the source, with template arguments, without ffnet::, return type and parameters."""
    ordered = sorted(mangled)
    filters = [found for tool in ("c++filt", "cu++filt") if (found := shutil.which(tool))]
    text = "\n".join(ordered)
    if filters:
        text = subprocess.run(filters[:1], input=text, capture_output=True, text=True, check=True).stdout
    names = dict(zip(ordered, map(_shorten, text.splitlines()), strict=True))
    for name, short in list(names.items()):
        if (
            list(names.values()).count(short) > 1
        ):  # the unnamed namespaces of two files; the mangled name has the file's
            source = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_", name)
            names[name] = f"{source[1] if source else name}.cu: {short}"
    return names


def _shorten(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|_GLOBAL__N_\w*::|\bffnet::", "", name)
    name = re.sub(r"\((?:unsigned )?(?:int|long)\)(-?\d)", r"\1", name)
    name = name.replace("(bool)1", "true").replace("(bool)0", "false").removeprefix("void ")
    if name.endswith(")"):
        depth = 0
        for i in range(len(name) - 1, -1, -1):
            depth += (name[i] == ")") - (name[i] == "(")
            if depth == 0:
                return name[:i]
    return name
