"""Registers and instruction counts of CUDA kernels, from their machine code as cuobjdump prints it."""

from __future__ import annotations

import bisect
import functools
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

# Kernels whose main loop goes down the rows of a panel (stream.h), a turn of as many rows as the filter has in each pass,
# and when what it holds is executed: in every turn (turn), for every row of the map (row) and of the result (result), or
# once a panel (setup), with what the loop around it, over panels, does. Where there is a residual, its fetches (fetch) and
# what adds it (residual) are executed in every turn and for every row of the result.
STREAMS = ("attention_forward_kernel", "attention_backward_kernel", "depthwise_stream_kernel")
PHASES = ("turn", "fetch", "row", "result", "residual", "setup")

# Instructions of a kernel that has nothing to do on an architecture older than its own.
EMPTY = 2

# Enumerators, which machine code has as numbers.
ENUMERATORS = {"Windows": ("alone", "aligned", "any"), "Epilogue": ("activate", "activation_backward")}


@functools.cache
def column(name: str) -> str:
    """The one of COUNTS that an instruction is counted in, besides the total."""
    base = name.split(".")[0]
    for column, names in CLASSES.items():
        if base in names or any("." in n and name.startswith(n) for n in names):
            return column
    return "other"


@functools.cache
def shared_clocks(name: str) -> int:
    """A clock for every 128 bytes that a warp moves, without bank conflicts."""
    base, *modifiers = name.split(".")
    if base == "SHFL":
        return 1
    if base in ("LDSM", "STSM"):
        return next((int(m) for m in modifiers if m in ("2", "4")), 1)
    if base in ("LDS", "STS", "LDGSTS"):
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    return 0


@dataclass
class Instruction:
    address: int
    name: str  # with its modifiers
    operands: str
    conditional: bool

    def pads(self) -> bool:
        """Whether it only fills the space behind a kernel's end."""
        return self.name == "NOP" or (self.name == "BRA" and self.operands == f"{self.address:#x}")

    def target(self) -> int | None:
        """Of a branch. BRA.DIV, to what lanes that have diverged do, is never taken by the warps of these kernels."""
        if self.name.split(".")[0] != "BRA" or ".DIV" in self.name:
            return None
        address = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(address[1], 16) if address else None

    def backward_target(self) -> int | None:
        address = self.target()
        return address if address is not None and address < self.address else None


def count(instructions: list[Instruction]) -> list[int]:
    totals = dict.fromkeys(COUNTS, 0)
    for instruction in instructions:
        totals["total"] += 1
        totals[column(instruction.name)] += 1
        totals["shared_clocks"] += shared_clocks(instruction.name)
    return list(totals.values())


def between(instructions: list[Instruction], first: int, end: int) -> list[Instruction]:
    """Those from address `first` to before `end`."""
    addresses = [i.address for i in instructions]
    return instructions[bisect.bisect_left(addresses, first) : bisect.bisect_left(addresses, end)]


def find_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Their bodies. A branch back across an unconditional EXIT returns from a rare path behind the kernel's end."""
    exits = [i.address for i in instructions if i.name == "EXIT" and not i.conditional]
    last: dict[int, int] = {}  # of the loop that begins at an address: `continue` branches back to it, too
    for branch in instructions:
        first = branch.backward_target()
        if first is not None and not any(first <= address < branch.address for address in exits):
            last[first] = branch.address
    return [between(instructions, first, end + 1) for first, end in last.items()]


def contains(outer: list[Instruction], inner: list[Instruction]) -> bool:
    return outer is not inner and outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address


def main_loop(loops: list[list[Instruction]]) -> list[Instruction] | None:
    """The loop that is likely to do most of the arithmetic, an inner one taken to run ten times in each pass around it.

    Arithmetic is HMMA, without any of it FP32, else every instruction.
    """
    depths = [sum(contains(outer, body) for outer in loops) for body in loops]
    for columns in ({"hmma_k16", "hmma_k8"}, {"fp32"}, {*CLASSES, "other"}):
        weights = [sum(column(i.name) in columns for i in b) * 10**d for b, d in zip(loops, depths, strict=True)]
        if any(weights):
            return loops[weights.index(max(weights))]
    return None


def executed(instructions: list[Instruction]) -> list[Instruction]:
    """Without the shorter side of every if-else: a warp goes through one of the two, the longer at worst.

    So go ReLU beside GELU, and the slow path of a 64-bit division.
    """
    previous = dict(zip((i.address for i in instructions[1:]), instructions, strict=False))
    left_out: set[int] = set()
    for branch in instructions:
        other = branch.target()
        if not branch.conditional or other is None or other <= branch.address or other not in previous:
            continue
        join = None if previous[other].conditional else previous[other].target()
        if previous[other] is not branch and join is not None and other < join <= instructions[-1].address:
            sides = (between(instructions, branch.address + 1, other), between(instructions, other, join))
            left_out |= {i.address for i in min(sides, key=len)}
    return [i for i in instructions if i.address not in left_out]


def skipped(instructions: list[Instruction]) -> Iterator[tuple[list[Instruction], int, int]]:
    """What conditional branches ahead skip: (instructions, address of the branch, its target)."""
    for branch in instructions:
        target = branch.target()
        if branch.conditional and target is not None and branch.address < target <= instructions[-1].address:
            yield between(instructions, branch.address + 1, target), branch.address, target


def whole_planes(instructions: list[Instruction]) -> list[Instruction]:
    """Without what only planes in several strips or segments run: the integer divisions that find a window's part."""
    found = [(region, first) for region, first, _ in skipped(instructions) if any(i.name[:3] == "I2F" for i in region)]
    innermost = [r for r, first in found if not any(f > first and q[-1].address <= r[-1].address for q, f in found)]
    left_out = {i.address for region in innermost for i in region}
    return [i for i in instructions if i.address not in left_out]


def phases(loops: list[list[Instruction]], main: list[Instruction]) -> list[list[int]] | None:
    """Counts of each of PHASES for a pass through the main loop, or None without a loop around it.

    What an instruction belongs to is decided by the innermost branch around it that skips a fetch, products, stores or
    the opening of a panel alone; without one it belongs to every turn.
    """
    regions = []
    for region, first, end in skipped(main):
        fetches = any(i.name.startswith("LDGSTS") for i in region)
        multiplies = any(i.name.startswith("HMMA") for i in region)
        stores = any(i.name.startswith("STG") for i in region)
        opens = any(i.name.startswith("I2F") for i in region)
        adds = any(i.name.split(".")[0] == "LDS" for i in region)
        kinds = {"fetch": fetches, "row": multiplies, "result": stores and not multiplies, "setup": opens}
        kind = next((kind for kind, found in kinds.items() if found), "residual" if adds else None)
        if kind and sum(kinds.values()) <= 1:
            regions.append((len(region), first, end, kind))
    regions.sort()
    parts: dict[str, list[Instruction]] = {phase: [] for phase in PHASES}
    for i in executed(whole_planes(main)):
        kind = next((kind for _, first, end, kind in regions if first < i.address < end), "turn")
        parts[kind].append(i)
    around = [loop for loop in loops if contains(loop, main)]
    if not around:
        return None
    inside = {i.address for i in main}
    parts["setup"] += [i for i in executed(whole_planes(min(around, key=len))) if i.address not in inside]
    return [count(parts[phase]) for phase in PHASES]


@dataclass
class Kernel:
    resources: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    loop: list[int] | None = None
    phases: list[list[int]] | None = None

    def row(self) -> list:
        return [*self.resources, self.counts, self.loop, self.phases]


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
    """{kernel: {architecture: [registers, stack, shared, counts, counts of the main loop or None, phases or None]}}"""
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
            kernel.counts, loops = count(instructions), find_loops(instructions)
            if body := main_loop(loops):
                kernel.loop = count(body)
                if any(stream in name for stream in STREAMS):
                    kernel.phases = phases(loops, body)
            elif kernel.counts[0] <= EMPTY:
                del kernels[name, architecture]
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
    for name, architecture in sorted(kernels, key=lambda key: int(re.sub(r"\D", "", key[1]))):
        result[readable[name]][architecture] = kernels[name, architecture].row()
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
    for enumeration, names in ENUMERATORS.items():
        for value, enumerator in enumerate(names):
            name = name.replace(f"({enumeration}){value}", enumerator)
    name = name.replace("(bool)1", "true").replace("(bool)0", "false").removeprefix("void ")
    if name.endswith(")"):
        depth = 0
        for i in range(len(name) - 1, -1, -1):
            depth += (name[i] == ")") - (name[i] == "(")
            if depth == 0:
                return name[:i]
    return name
