"""What a panel takes one scheduler of a multiprocessor, stalls included, predicted from a kernel's machine code.

The assembler writes into each instruction how many clocks the warp waits after it, and for which results that come
when they come. `clocks_a_panel` runs a few warps through a panel's instructions with these, with estimates of what the
units take: no GPU has confirmed them yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuda_machine_code import (
    Instruction,
    between,
    column,
    contains,
    executed,
    find_loops,
    skipped,
    whole_planes,
)


@dataclass(frozen=True)
class Unit:
    """What runs an instruction: clocks until it takes the next one of a warp, and until its result is there."""

    name: str
    busy: float
    latency: float


# Estimates, of sm_90. A tensor core takes an m16n8k16 product of 4096 multiplications at 512 a clock and scheduler,
# and something for its operands' way; the special functions have 4 lanes, the way to shared memory moves 32 bytes a
# clock for each of four schedulers.
HMMA_K16 = Unit("tensor", 6.4, 33)
HMMA_K8 = Unit("tensor", 3.2, 25)
SPECIAL = Unit("special", 8, 22)
FLOAT = Unit("float", 1, 4)
MULTIPLY = Unit("multiply", 2, 5)
INTEGER = Unit("integer", 2, 5)
CONTROL = Unit("control", 1, 4)
UNIFORM = Unit("uniform", 2, 8)
CONSTANT = Unit("memory", 4, 30)
SHUFFLE = Unit("memory", 4, 24)
TRANSPOSE = Unit("memory", 4, 33)  # of an 8x8 matrix between lanes: as a shuffle, but as late as from shared memory
SHARED_LATENCY, GLOBAL_LATENCY = 33, 40  # of a copy that a kernel waits for elsewhere
OPERANDS = 10  # clocks until they are read
CONTROLS = frozenset(("BRA", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "LDGDEPBAR", "DEPBAR", "NOP", "BAR", "YIELD", "CALL",
                      "RET", "BREAK", "ERRBAR", "NANOSLEEP", "CCTL"))  # fmt: skip


def unit(name: str) -> Unit:
    base, *modifiers = name.split(".")
    kind = column(name)
    if kind == "hmma_k16":
        return HMMA_K16
    if kind == "hmma_k8":
        return HMMA_K8
    if kind == "mufu" or base in ("I2F", "F2I", "F2F", "I2FP"):
        return SPECIAL
    if kind in ("shared_load", "shared_store", "global_load", "global_store"):
        width = 4 if {"128", "4"} & {*modifiers} else 2 if {"64", "2"} & {*modifiers} else 1
        if base == "STG":
            width = 1
        return Unit("memory", 4 * width, SHARED_LATENCY if base in ("LDS", "LDSM", "STS") else GLOBAL_LATENCY)
    if kind == "shuffle":
        return SHUFFLE
    if base == "MOVM":
        return TRANSPOSE
    if kind == "fp32":
        return FLOAT
    if base in ("IMAD", "IDP"):
        return MULTIPLY
    if base in CONTROLS:
        return CONTROL
    if base in ("S2R", "LDC", "CS2R", "S2UR"):
        return CONSTANT
    if base.startswith(("U", "VOTE")) or base == "R2UR":
        return UNIFORM
    return INTEGER


def clocks_a_panel(trace: list[Instruction], warps: int, panels: int = 8) -> float:
    """Of a scheduler that runs `warps` of them through `trace` again and again: between two panels that are done."""
    units = [unit(i.name) for i in trace]
    names = sorted({u.name for u in units})
    code = [
        (names.index(u.name), u.busy, max(u.latency, u.busy), max(OPERANDS, u.busy), max(1, i.stall), i.result_barrier,
         i.operand_barrier, [k for k in range(6) if i.waits >> k & 1])
        for i, u in zip(trace, units, strict=True)
    ]  # fmt: skip
    free = [0.0] * len(names)
    place, passes = [0] * warps, [0] * warps
    ready = [5.0 * w for w in range(warps)]  # they never begin at once
    barriers = [[0.0] * 6 for _ in range(warps)]  # when each opens
    ends: list[float] = []
    clock, last = 0.0, 0
    while len(ends) < warps * panels:
        soonest = float("inf")
        for w in (last, *(w for w in range(warps) if w != last)):  # the one that issued, then the oldest
            if passes[w] == panels:
                continue
            pipe, busy, latency, operands, stall, result_barrier, operand_barrier, waits = code[place[w]]
            at = max(ready[w], free[pipe])
            for k in waits:
                at = max(at, barriers[w][k])
            if at > clock:
                soonest = min(soonest, at)
                continue
            free[pipe] = clock + busy
            if result_barrier < 6:
                barriers[w][result_barrier] = max(barriers[w][result_barrier], clock + latency)
            if operand_barrier < 6:
                barriers[w][operand_barrier] = max(barriers[w][operand_barrier], clock + operands)
            ready[w] = clock + stall
            last = w
            place[w] += 1
            if place[w] == len(code):
                place[w] = 0
                passes[w] += 1
                ends.append(clock)
            clock += 1
            break
        else:
            clock = soonest
    first, end = len(ends) // 4, 3 * len(ends) // 4  # while all run
    return (ends[end] - ends[first]) / (end - first)


@dataclass(frozen=True)
class PanelCode:
    """Of a kernel whose schedule the compiler knows (csrc/cuda/schedule.h)."""

    setup: list[Instruction]  # before the first panel, and after the last
    panel: list[Instruction]  # of whole planes

    @property
    def products(self) -> int:
        return sum(i.name.startswith("HMMA") for i in self.panel)


def panel_code(instructions: list[Instruction], full_turns: int) -> PanelCode | None:
    """What a warp executes, the loop over full turns `full_turns` times; None where the code is not what it must be.

    There is a loop over panels, in it at most one over turns, and no branch around a product: what is skipped are
    divisions for planes that are cut into parts, which these are not, and a row that a plane lacks.
    """
    loops = [loop for loop in find_loops(instructions) if any(i.name.startswith("HMMA") for i in loop)]
    outer = [loop for loop in loops if not any(contains(other, loop) for other in loops)]
    inner = [loop for loop in loops if any(contains(other, loop) for other in loops)]
    if len(outer) != 1 or len(inner) > 1 or bool(inner) != bool(full_turns):
        return None
    places = {i.address for loop in inner for i in loop}
    branched = (i for region, _, _ in skipped(outer[0]) for i in region if i.address not in places)
    branched_within = (i for loop in inner for region, _, _ in skipped(loop) for i in region)
    if any(i.name.startswith("HMMA") for i in (*branched, *branched_within)):
        return None
    repeated = executed(whole_planes(inner[0])) if inner else []
    panel: list[Instruction] = []
    for i in executed(whole_planes(outer[0])):
        if repeated and i.address == repeated[0].address:
            panel += repeated * full_turns
        elif i.address not in places:
            panel.append(i)
    setup = executed(between(instructions, 0, outer[0][0].address))
    after = executed([i for i in instructions if i.address > outer[0][-1].address])
    setup += (i for i in after if not i.name.startswith("NOP"))
    setup += (i for loop in find_loops(after) for i in loop)  # over taps, of which there are more than lanes
    return PanelCode(setup, panel)


@dataclass(frozen=True)
class Gpu:
    """`bandwidth` in bytes a second, `clock` in Hz."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    source: str

    @property
    def bytes_a_clock(self) -> float:
        """Of one multiprocessor."""
        return self.bandwidth / self.multiprocessors / self.clock


H100 = Gpu("H100 SXM", 132, 1.755e9, 3.35e12, "data sheet: what its memory moves at most")
H200 = Gpu("H200", 132, 1.98e9, 4.3e12, "what a copy was seen to move, of 4.8 TB/s")
REGISTERS, THREADS, SHARED, SHARED_OF_A_BLOCK = 65536, 2048, 228 * 1024, 1024  # of a multiprocessor; reserved
WARPS = 4  # of a block, one for each scheduler
START_ROWS = 6  # that a block's start takes as long as, besides those of its filter (plan_stream in csrc/cuda/stream.h)
START_CLOCKS = 900  # until a block's first rows and its filters, which are fetched at once, are there


def resident_blocks(registers: int, shared: int) -> int:
    """How many blocks of WARPS run at once, of kernels with so many registers and bytes of shared memory."""
    allocated = -(-registers // 8) * 8 * 32 * WARPS
    return min(REGISTERS // allocated, THREADS // (32 * WARPS), SHARED // (shared + SHARED_OF_A_BLOCK))


def split(panels: int, channels: int, panel_rows: int, start_rows: int, resident: int, multiprocessors: int) -> int:
    """Panels of a split, as stream_split in csrc/cuda/stream.h chooses them."""
    wave = max(1, resident * multiprocessors * WARPS // channels)
    most, step = min(panels, 4 * wave + 1), max(1, wave // 64)
    best, least = panels, 0.0
    for wanted in range(min(max(1, wave // 4), most), most + 1, step):
        a_split = -(-panels // wanted)
        blocks = -(-(-(-panels // a_split) * channels) // WARPS)
        fullest = -(-blocks // multiprocessors)
        idle = {1: 0.6, 2: 0.2}.get(fullest % resident, 0.0)
        cost = (fullest + idle) * (float(a_split) * panel_rows + start_rows)
        if least == 0 or cost < least:
            best, least = a_split, cost
    return best


def block_panels(panels: int, channels: int, a_split: int) -> list[int]:
    """The panels of the longest warp of each block of a grid, in the order in which they start."""
    tasks = [min(a_split, panels - first) for first in range(0, panels, a_split) for _ in range(channels)]
    return [max(tasks[i : i + WARPS]) for i in range(0, len(tasks), WARPS)]


def clocks_of_grid(
    blocks: list[int], resident: int, clocks: list[float], start: list[float], panel_bytes: float, gpu: Gpu
) -> float:
    """Until a grid ends, as a fluid: blocks go on as fast as those beside them and the memory let them.

    Args:
        blocks: panels of each.
        resident: how many run at once on a multiprocessor.
        clocks: that a scheduler takes a panel, of 1, 2 ... resident warps of it.
        start: clocks before a block's first panel, by the same.
        panel_bytes: read and written for a panel of one warp.
    """
    most = gpu.bandwidth / gpu.clock / panel_bytes / WARPS  # panels a clock that the memory serves
    waiting = blocks[::-1]
    running: list[list[list[float]]] = [[] for _ in range(gpu.multiprocessors)]  # [clocks to start, panels left]

    def fill() -> None:
        while waiting:
            free = min(running, key=len)
            if len(free) == resident:
                return
            free.append([start[len(free)], float(waiting.pop())])

    fill()
    now = 0.0
    while any(running):
        active = [sum(delay <= 0 for delay, _ in blocks) for blocks in running]
        rates = [1 / clocks[n - 1] / n if n else 0.0 for n in active]  # of each block
        total = sum(rate * n for rate, n in zip(rates, active, strict=True))
        rates = [rate * min(1.0, most / total) for rate in rates] if total else rates
        step = min(
            delay if delay > 0 else left / rate
            for rate, blocks in zip(rates, running, strict=True)
            for delay, left in blocks
        )
        now += step
        for rate, blocks in zip(rates, running, strict=True):
            for block in blocks:
                if block[0] > 0:
                    block[0] = max(0.0, block[0] - step) if block[0] - step > 1e-6 else 0.0
                else:
                    block[1] -= rate * step
            blocks[:] = [block for block in blocks if block[1] > 1e-6]
        fill()
    return now
