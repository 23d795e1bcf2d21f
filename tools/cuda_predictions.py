"""How far the streaming CUDA kernels would be from the speed of memory on the maps of FFNet and ConvNeXt: predictions.

No GPU has confirmed one of them. What they rest on: cuda_stall_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cuda_machine_code import Code
from cuda_stall_model import (
    H100,
    H200,
    START_CLOCKS,
    START_ROWS,
    WARPS,
    Gpu,
    PanelCode,
    block_panels,
    clocks_a_panel,
    clocks_of_grid,
    panel_code,
    resident_blocks,
    split,
)

ARCHITECTURE = "90"
GPUS = (H100, H200)
IMAGES = (128, 512)
DTYPES = ("Half", "BFloat16")
KNOWN = "Rows"  # in the names of the kernels that predictions are made of


@dataclass(frozen=True)
class Case:
    """Square planes that a streaming kernel goes through, in a network."""

    operator: str
    kernel: str
    filter: int
    convolutions: int
    maps: int  # that are read or written
    rings: int  # of maps that it reads
    size: int
    channels: int
    limit: float  # of the time against that of its memory accesses
    filters: int = 0  # whose gradients are summed up
    chain: int = 0  # convolutions one after the other, where not all are

    @property
    def windows(self) -> int:
        return min(8, -(-self.size // 8))

    @property
    def panels_of(self) -> int:
        """Images of a panel."""
        return 2 * (8 // self.windows)

    def panels(self, images: int) -> int:
        return -(-images // self.panels_of)

    def name(self, dtype: str) -> str:
        """Of the kernel (with_stream_kernel in stream.h)."""
        windows = f"linear{self.size}" if self.size in (7, 14, 28) else "aligned"
        if self.size == 8:
            windows = "alone"
        plane = self.filter == 7 and self.size in (7, 8, 14, 16)
        rows = f"PlaneRows<{self.size}>" if plane else f"HighRows<{self.size % self.filter}>"
        return self.kernel.format(dtype=dtype, filter=self.filter, windows=windows, rows=rows)

    @property
    def lag(self) -> int:
        return self.filter // 2 * (self.chain or self.convolutions)

    @property
    def full_turns(self) -> int:
        """Passes through the loop of a kernel that has one (HighRows)."""
        ahead = 2 if self.filter == 7 else 4
        return 0 if "PlaneRows" in self.name("Half") else -(-(self.size + self.lag) // self.filter) - 1 - ahead

    @property
    def products(self) -> int:
        """Of a panel: every row of the filter on every row of a plane, without those that lie in the padding."""
        outside = self.filter // 2 * (self.filter // 2 + 1)
        # Sums of whole rows are those of the biases; of two maps, the later one's rows are as much later as it is.
        later = self.filter // 2 if self.filters == 2 and not self.whole else 0
        sums = self.size + later if self.filters else 0
        return (self.size * self.filter - outside) * (self.convolutions + self.filters) + sums

    @property
    def whole(self) -> bool:
        """Whether planes stay in shared memory, with two maps that are computed (attention_backward_planes.cu)."""
        return "planes" in self.kernel

    @property
    def shared(self) -> int:
        if self.whole:
            return WARPS * (4 * (self.size + self.size % 2) * 256 + 3 * 736)
        stages, rows = 3 if self.filter == 7 else 5, self.filter
        if self.size == 14 and self.filter == 7:  # a stage is a whole plane (StreamRing in stream.h)
            stages, rows = 2, 14
        return WARPS * self.rings * stages * rows * 256

    @property
    def panel_bytes(self) -> float:
        """As if all images were whole panels."""
        return self.panels_of * self.size * self.size * 2.0 * self.maps


def _cases() -> list[Case]:
    attention = "attention_forward_kernel<{dtype}, {filter}, {windows}, {rows}>"
    depthwise = "depthwise_stream_kernel<{dtype}, {filter}, {windows}, %s, {rows}>"
    mixers = [(3, 64, 80), (3, 32, 160), (7, 16, 320), (7, 8, 640), (3, 56, 80), (3, 28, 160), (7, 14, 320),
              (7, 7, 640), (7, 64, 80), (7, 32, 160), (7, 28, 160)]  # fmt: skip
    cases = [Case("token mixer", attention, k, 2, 3, 2, size, c, LIMITS[size]) for k, size, c in mixers]
    cases.append(Case("token mixer, no residual", attention, 7, 2, 2, 2, 16, 320, LIMITS[16]))
    cases = [replace(case, limit=NOT_MET.get((case.operator, case.size), case.limit)) for case in cases]
    for k, size, c in [(7, 64, 88), (7, 32, 176), (7, 16, 352), (7, 8, 704), (7, 56, 96), (7, 28, 192), (7, 14, 384),
                       (7, 7, 768), (3, 64, 80), (3, 32, 160)]:  # fmt: skip
        limit = NOT_MET.get(("depthwise", size), DEPTHWISE)
        cases.append(Case("depthwise", depthwise % "clamped", k, 1, 2, 1, size, c, limit))
    for size, c in [(64, 88), (16, 352), (8, 704)]:
        limit = NOT_MET.get(("depthwise, GELU", size), DEPTHWISE)
        cases.append(Case("depthwise, GELU", depthwise % "smooth", 7, 1, 2, 1, size, c, limit))
    backward = "depthwise_backward_kernel<{dtype}, {filter}, {windows}, %s, {rows}>"
    for slope, name in (("gelu", "depthwise, backward of GELU"), ("none", "depthwise, backward")):
        for k, size, c in [(7, 64, 88), (7, 32, 176), (7, 16, 352), (7, 8, 704), (7, 28, 192), (7, 14, 384),
                           (7, 7, 768), (3, 64, 80), (3, 32, 160)]:  # fmt: skip
            limit = NOT_MET.get((name, size), BACKWARD)
            computed = 2 if slope == "gelu" else 1
            cases.append(Case(name, backward % slope, k, computed, 3, 2, size, c, limit, filters=1, chain=2))
    name = "token mixer, backward"
    for k, size, c in [(3, 64, 80), (3, 32, 160), (3, 56, 80), (7, 16, 320), (7, 8, 640), (7, 7, 640)]:
        kernel = attention.replace("forward", "backward")
        if k == 7:
            kernel = "attention_backward_planes_kernel<{dtype}, {windows}, {rows}>"
        limit = NOT_MET.get((name, size), BACKWARD)
        cases.append(Case(name, kernel, k, 3, 3, 2, size, c, limit, filters=2, chain=2))
    return cases


# What is aimed at, by the size of the map; and what is held meanwhile where that is not met. Of 128 images with maps of
# 7 or 8 rows a warp has two or three panels only, as long as which its start takes; the mixer's own work is more than
# the accesses of two maps; its backward under high filters has registers for two or three warps of a scheduler only.
NOT_MET = {
    ("token mixer, no residual", 16): 1.7,
    ("depthwise", 7): 1.3,
    ("depthwise, GELU", 8): 1.3,
    ("token mixer, backward", 16): 2.4,
    ("token mixer, backward", 8): 1.9,
    ("token mixer, backward", 7): 2.7,
}
BACKWARD, DEPTHWISE = 1.8, 1.2
LIMITS = {64: 1.3, 56: 1.3, 32: 1.3, 28: 1.6, 16: 1.3, 14: 1.6, 8: 1.3, 7: 1.6}
CASES = _cases()


@dataclass(frozen=True)
class Prediction:
    """Of a kernel on a GPU; `ratios` by images, with the waves of its blocks."""

    case: Case
    gpu: Gpu
    resident: int  # blocks of a multiprocessor
    issue: float  # clocks of a multiprocessor for a row of a panel, if no warp ever waited
    stalls: float  # with all waits
    memory: float
    ratios: dict[int, float]

    @property
    def worst(self) -> float:
        return max(self.ratios.values())

    def problem(self) -> str | None:
        if self.worst <= self.case.limit:
            return None
        case, images = self.case, max(self.ratios, key=lambda n: self.ratios[n])
        return (
            f"{case.operator}, {case.filter}x{case.filter} at {case.size}x{case.size}, {self.gpu.name}: predicted to "
            f"take {self.worst:.2f} times as long as its memory accesses with {images} images, the limit is "
            f"{case.limit}"
        )


class NotAsExpected(Exception):
    """A kernel's code that the model would misread."""


def read_code(case: Case, code: Code, dtype: str) -> PanelCode:
    name = case.name(dtype)
    if name not in code:
        raise NotAsExpected(f"{name}, sm_{ARCHITECTURE}: predictions are made of it, and it is not there")
    found = panel_code(code[name], case.full_turns)
    if found is None:
        raise NotAsExpected(f"{name}, sm_{ARCHITECTURE}: products stand in branches, or loops are not those of panels")
    if found.products != case.products:
        raise NotAsExpected(
            f"{name}, sm_{ARCHITECTURE}: {found.products} products a panel of {case.size} rows, not {case.products}"
        )
    return found


def predict(case: Case, code: Code, registers: dict[str, int]) -> list[Prediction]:
    """For each of GPUS, of the dtype with more instructions. Raises NotAsExpected."""
    found, name = max(((read_code(case, code, d), case.name(d)) for d in DTYPES), key=lambda each: len(each[0].panel))
    resident = resident_blocks(registers[name], case.shared)
    clocks = [clocks_a_panel(found.panel, warps) for warps in range(1, resident + 1)]
    start = [START_CLOCKS + float(len(found.setup)) * warps for warps in range(1, resident + 1)]
    rows = case.size * WARPS  # a row of a panel for each scheduler
    predictions = []
    for gpu in GPUS:
        ratios = {}
        for images in IMAGES:
            panels = case.panels(images)
            a_split = split(panels, case.channels, case.size, case.filter + START_ROWS, resident, gpu.multiprocessors)
            blocks = block_panels(panels, case.channels, a_split)
            floor = panels * case.channels * case.panel_bytes / gpu.bandwidth * gpu.clock
            ratios[images] = clocks_of_grid(blocks, resident, clocks, start, case.panel_bytes, gpu) / floor
        memory = case.panel_bytes / case.size / gpu.bytes_a_clock
        predictions.append(Prediction(case, gpu, resident, len(found.panel) / rows, clocks[-1] / rows, memory, ratios))
    return predictions


def predict_all(code: Code, registers: dict[str, int]) -> tuple[list[Prediction], list[str]]:
    """Of all CASES, and what is wrong: limits exceeded, kernels that are missing or not what the model can read."""
    predictions, problems = [], []
    for case in CASES:
        try:
            predictions += predict(case, code, registers)
        except NotAsExpected as reason:
            problems.append(str(reason))
    return predictions, problems + [problem for p in predictions if (problem := p.problem())]


def table(predictions: list[Prediction]) -> list[dict]:
    """As docs/cuda-resources.json has them: rounded, so that they compare."""
    return [
        {
            "operator": p.case.operator, "filter": p.case.filter, "map": p.case.size, "channels": p.case.channels,
            "gpu": p.gpu.name, "blocks": p.resident, "issue": round(p.issue, 1), "stalls": round(p.stalls, 1),
            "memory": round(p.memory, 1), **{f"ratio_{n}": round(ratio, 2) for n, ratio in p.ratios.items()},
            "limit": p.case.limit,
        }
        for p in predictions
    ]  # fmt: skip


def markdown(predictions: list[Prediction]) -> str:
    gpus = "\n".join(
        f"- {g.name}: {g.multiprocessors} multiprocessors at {g.clock / 1e9:g} GHz, {g.bandwidth / 1e12:g} TB/s, "
        f"{g.source}"
        for g in GPUS
    )
    images = " and ".join(map(str, IMAGES))
    text = f"""## Predicted until a GPU confirms it

No GPU has run these kernels. `tools/cuda_stall_model.py` reads from the machine code (sm_{ARCHITECTURE}) how long each
instruction holds its warp and what it waits for, and runs the warps of one scheduler through a panel with estimates of
what the units take. Clocks are those of one multiprocessor for a row of a panel, a warp on each of its four schedulers:

    issue    instructions / 4, as if no warp ever waited
    stalls   with all waits, with as many warps as registers and shared memory allow
    memory   the row's bytes at the GPU's speed

The ratio is the time of a whole launch against that of its memory accesses, for {images} images: with the start of each
block, and with blocks that are too many or too few for the multiprocessors. Not in it: host code, clocks that fall
under load, and that stores of 4 bytes (of 2, of maps 7 wide) are slower than longer ones. A ratio over its limit fails
the check.

{gpus}

"""
    heads = ["operator", "filter", "map", "channels", "blocks", "issue", "stalls"]
    heads += [f"{g.name}: memory | {' | '.join(f'N = {n}' for n in IMAGES)}" for g in GPUS]
    text += f"| {' | '.join(heads)} | limit |\n{'|---' * (8 + len(GPUS) * (1 + len(IMAGES)))}|\n"
    by_case: dict[Case, list[Prediction]] = {}
    for p in predictions:
        by_case.setdefault(p.case, []).append(p)
    for case, found in by_case.items():
        cells = [case.operator, f"{case.filter}×{case.filter}", f"{case.size}²", str(case.channels)]
        cells += [str(found[0].resident), f"{found[0].issue:.1f}", f"{found[0].stalls:.1f}"]
        for p in found:
            cells += [f"{p.memory:.1f}", *(f"**{ratio:.2f}**" for ratio in p.ratios.values())]
        note = " **exceeded**" if any(p.problem() for p in found) else ""
        if (case.operator, case.size) in NOT_MET:
            aim = BACKWARD if case.filters else DEPTHWISE if case.convolutions == 1 else LIMITS[case.size]
            note += f", aim {aim}"
        text += f"| {' | '.join(cells)} | {case.limit}{note} |\n"
    return text
