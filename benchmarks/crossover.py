"""``python -m benchmarks crossover``: which calls plain PyTorch computes as fast as the CPU kernels or faster, measured
for the instruction set in use, and written as the table of `ffnet_kernels.backends.crossover`, with the rules that
follow from it.

A probe is a call on either side of a rule, in the form in which the chooser meets it. Both sides take turns (`runner`).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from ffnet_kernels import kernels, native
from ffnet_kernels.backends import crossover
from ffnet_kernels.backends.activations import ACTIVATE
from ffnet_kernels.backends.crossover import Rules, is_left, rules_of
from ffnet_kernels.ops.batch_norm import Norm, batch_norm

from .cases import LAYOUTS, OperatorCase
from .contenders import Eager, Ours
from .options import parser_of, positive
from .report import markdown
from .results import OURS, Row, machine, machine_line, replacing
from .runner import INTERRUPTED, Runner, progress
from .work import MEMORY_FORMATS, SEED, ModelWork, OperatorWork, Program, Work, Wrap, as_is, build

THEIRS = "plain PyTorch"
PASSES, SAMPLES = 2, 7
#: Further passes over the rows that contradict the rules.
MORE_PASSES = 2
#: What the kernels have to gain on a kind of calls, else it is left to PyTorch, whose gradients are better known.
GAIN = 0.05
#: A ratio that is off by so much is no noise, and must agree with the rules.
CLEAR = 1.1
#: Calls that gain less, all together, do not move a number.
NOISE = math.log(1.02)
#: What makes a processor pass for an older one: to the kernels, to PyTorch and to oneDNN.
LIMITS = ("FFNET_KERNELS_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Probe:
    """A call that a rule decides about by ``at``, a number or a kind; ``work`` builds what is measured, on so many
    threads, or those of the run."""

    rule: str
    at: int | str
    name: str
    work: Callable[[], Any]
    threads: int | None = None
    flops: ClassVar[int] = 0  # not counted
    bytes: ClassVar[int] = 0


@dataclass(frozen=True)
class Pair(Work):
    """Two functions of the same tensors; if the first tensors need ``gradients``, with their backward passes."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    gradients: int = 0
    layout: str = "channels_last"
    dtype = torch.float32

    @property
    def inference(self) -> bool:  # type: ignore[override]
        return not self.gradients

    def plain(self, layout: str, wrap: Wrap = as_is) -> Program:
        return self._program(self.theirs, self.tensors)

    def fused(self, layout: str | None = None) -> Program:
        return self._program(self.ours, self.tensors)

    def expected(self) -> list[Tensor]:
        return self._program(self.theirs, tuple(t.double() for t in self.tensors)).results()

    def _program(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Program:
        inputs = [t.detach().requires_grad_(i < self.gradients) for i, t in enumerate(tensors)]
        wanted = inputs[: self.gradients]
        # Not like the map: its gradient would be nothing but rounding.
        incoming = _random(*function(*inputs).shape, seed=SEED + 1).to(inputs[0].dtype)

        def step() -> list[Tensor]:
            out = function(*inputs)
            return [out.detach(), *(torch.autograd.grad(out, wanted, incoming) if wanted else ())]

        return Program(step, [()], self.layout, judged=list)


def probes() -> Iterator[Probe]:
    """All probes, rule by rule."""
    narrow = ("depthwise_conv2d", 1, 56, 3), ("depthwise_conv2d", 8, 28, 7), ("ffnified_attention", 1, 28, 7)
    for channels, (operator, batch, size, kernel) in product((2, 3, 4, 6, 8, 16), narrow):
        case = OperatorCase(operator, batch, channels, size, kernel)
        yield Probe("few_channels", channels, case.name, partial(build, case))
    small = ("depthwise_conv2d", 8, 256, 3), ("ffnified_attention", 4, 64, 7), ("channel_mixer", 8, 64, 3)
    for size, (operator, batch, channels, kernel), layout in product((1, 2, 3, 4, 7), small, LAYOUTS):
        case = OperatorCase(operator, batch, channels, size, kernel, layout)
        yield Probe("few_pixels", size * size, case.name, partial(build, case))
    for channels, (batch, size) in product((8, 16, 32, 48, 64, 96, 128, 256), ((1, 28), (1, 56), (8, 14), (4, 28))):
        rule, name = "nchw_values" if batch == 1 else "nchw_batch_values", f"{channels}x{size}x{size} k1 b{batch}"
        shape = batch, channels, size, size
        yield Probe(rule, channels * size * size, f"conv2d {name} nchw", partial(_bare, shape))
    for rows, sides in product((1, 4, 8, 16, 32, 64, 128, 256), ((96, 384, "gelu"), (384, 96, "none"))):
        name = f"linear {rows}x{sides[0]} to {sides[1]} {sides[2]}"
        yield Probe("few_rows", rows, name, partial(_linear, rows, *sides))
    layers = (64, 2), (64, 4), (64, 8), (128, 4), (64, 11), (64, 16), (128, 8), (128, 11), (64, 23), (64, 32), (128, 32)
    for channels, size in layers:
        name = f"optimized 1x1 layer {channels}x{size}x{size} b1 channels_last"
        yield Probe("little_work", (channels * size) ** 2, name, partial(_layer, channels, size))
    shapes = (8, 64, 28, 28), (4, 96, 14, 14)
    for layout, activation, shape in product(LAYOUTS, ("none", "relu", "gelu", "silu"), shapes):
        name = f"batch_norm training {'x'.join(map(str, shape))} {activation} {layout}"
        work = partial(_norm, shape, layout, activation)
        yield Probe("norm", crossover.kind_of_norm(activation, layout == "channels_last"), name, work)
    for threads, shape in product((1, None), shapes):
        at = crossover.kind_of_threads(threads or 2)
        name = f"1x1 layer training {'x'.join(map(str, shape))} to {2 * shape[1]} channels_last, {at}"
        yield Probe("projection", at, name, partial(_projection, shape), threads)


def _random(*shape: int, fan_in: int = 1, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / fan_in**0.5


def _pointwise(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return _random(outputs, inputs, 1, 1, fan_in=inputs), _random(outputs)


def _bare(shape: tuple[int, ...]) -> OperatorWork:
    weight, bias = _pointwise(shape[1], shape[1])
    arguments = {"x": _random(*shape), "weight": weight, "bias": bias, "stride": 1, "padding": "same"}
    return OperatorWork("conv2d", {**arguments, "activation": "none", "scale": None, "residual": None}, "nchw")


def _linear(rows: int, inputs: int, outputs: int, activation: str) -> Pair:
    sides = kernels.linear_of_many_rows, kernels.linear_of_few_rows
    ours, theirs = (partial(side, activation=activation, scale=None, residual=None) for side in sides)
    weight, bias = _pointwise(inputs, outputs)
    return Pair(ours, theirs, (_random(rows, inputs), weight.flatten(1), bias))


def _layer(channels: int, size: int) -> ModelWork:
    layer = nn.Conv2d(channels, channels, 1)
    layer.load_state_dict(dict(zip(("weight", "bias"), _pointwise(channels, channels), strict=True)))
    return ModelWork(layer.eval(), [_random(1, channels, size, size)])


def _norm(shape: tuple[int, ...], layout: str, activation: str) -> Pair:
    def ours(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return batch_norm(x, Norm(mean, variance, weight, bias), activation)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return ACTIVATE[activation](Norm(mean, variance, weight, bias)(x))

    x = _random(*shape).contiguous(memory_format=MEMORY_FORMATS[layout])
    vectors = _random(shape[1]), _random(shape[1]), torch.zeros(shape[1]), torch.ones(shape[1])
    return Pair(ours, theirs, (x, *vectors), 3, layout)


def _projection(shape: tuple[int, ...]) -> Pair:
    ours = partial(kernels.conv2d, stride=(1, 1), padding=(0, 0, 0, 0), activation="none")
    x = _random(*shape).contiguous(memory_format=torch.channels_last)
    return Pair(ours, torch.conv2d, (x, *_pointwise(shape[1], 2 * shape[1])), 3)


def measure(chosen: Sequence[Probe], passes: int, samples: int) -> dict[str, Row]:
    """Measures both sides of probes, in passes over all of them, with no call left to PyTorch.

    Raises:
        RuntimeError: if a probe fails, or its results are wrong.
    """
    runner, threads = Runner([Ours(), Eager(THEIRS)], samples), torch.get_num_threads()
    rows: dict[str, Row] = {}
    with mock.patch.object(crossover, "now", Rules()), progress(passes * len(chosen), "probes") as bar:
        for probe in list(chosen) * passes:
            torch.set_num_threads(probe.threads or threads)
            try:
                row = runner.run(probe, probe.work()).row
            finally:
                torch.set_num_threads(threads)
            for one in row.measurements:
                if not one.passed:
                    raise RuntimeError(f"{probe.name}: {one.contender}: {one.reason or f'an error of {one.error}'}")
            rows[probe.name] = rows[probe.name].joined(row) if probe.name in rows else row
            bar.update()
    return rows


def rows_of(chosen: Iterable[Probe], measured: dict[str, Row]) -> list[dict[str, Any]]:
    """The rows of the table: see `crossover.read`."""
    calls: dict[tuple, dict[str, float]] = {}
    for probe in chosen:
        ratio = measured[probe.name].ratio(OURS, to=THEIRS)
        assert ratio is not None
        calls.setdefault((probe.rule, probe.at), {})[probe.name] = round(ratio, 3)
    return [
        {"rule": rule, "at": at, "ratio": round(statistics.geometric_mean(ratios.values()), 3), "calls": ratios}
        for (rule, at), ratios in calls.items()
    ]


def rules_from(rows: Sequence[dict[str, Any]]) -> Rules:
    """The rules that rows give. A number is the one up to which leaving calls to PyTorch gains most: that with the
    largest sum of logarithms of the ratios. A kind is left to PyTorch unless the kernels gain `GAIN`."""
    found: dict[str, Any] = {}
    for rule, default in Rules()._asdict().items():
        own = [row for row in rows if row["rule"] == rule]
        if isinstance(default, tuple):
            found[rule] = tuple(row["at"] for row in own if row["ratio"] > 1 - GAIN)
            continue
        found[rule], gained, most = default, 0.0, NOISE
        for row in sorted(own, key=lambda row: row["at"]):
            gained += math.log(row["ratio"])
            if gained > most:
                found[rule], most = row["at"], gained
    return Rules(**found)


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a table that follows from its rows: a rule that has a number cannot do justice to every row."""
    rules = rules_from(rows)
    against = [[row["rule"], row["at"]] for row in contradictions(rows, rules)]
    return {"rules": rules._asdict(), "against": against, "rows": rows}


def contradictions(rows: Iterable[dict[str, Any]], rules: Rules) -> list[dict[str, Any]]:
    """The rows that are clearly faster where the rules do not run them."""
    return [row for row in rows if (1 / row["ratio"] if is_left(rules, row) else row["ratio"]) >= CLEAR]


def plain_text(table: dict[str, Any]) -> str:
    """A table as JSON with a line for each row."""
    head = json.dumps({**table, "rows": None}, indent=1, ensure_ascii=False)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in table["rows"])
    return head.replace('"rows": null', f'"rows": [\n{rows}\n ]') + "\n"


def text_of(table: dict[str, Any]) -> str:
    """A table as Markdown, below its machine."""
    rules, headers = rules_of(table), ("rule", "at", "time / PyTorch's", "runs on", "")
    against = contradictions(table["rows"], rules)
    lines = [
        (row["rule"], str(row["at"]), f"{row['ratio']:.2f}", "PyTorch" if is_left(rules, row) else "kernels",
         "clearly slower" if row in against else "")
        for row in table["rows"]
    ]  # fmt: skip
    return f"{table['machine']}\n\n{markdown(headers, lines, left=(0, 1))}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if rows contradict the rules or results are wrong, 2 without CPU kernels, 130 after Ctrl-C."""
    parser = parser_of(
        "crossover",
        "Measures calls that plain PyTorch may compute as fast as the CPU kernels of the instruction set in use, and "
        "writes the table by which such calls are left to it.",
        "For AVX2 on a newer processor: FFNET_KERNELS_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2.",
    )
    add = parser.add_argument
    add("--threads", type=positive, metavar="N", help="threads (default: torch's)")
    add("--samples", type=positive, default=SAMPLES, metavar="N", help="of a call in each pass (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="default: the table in the package")
    options = parser.parse_args(argv)
    if (reason := native.cpu_library_error()) is not None:
        print(f"there are no CPU kernels: {reason}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen, here = list(probes()), machine()
    try:
        measured = measure(chosen, PASSES, options.samples)
        for _ in range(MORE_PASSES):
            rows = rows_of(chosen, measured)
            doubtful = {name for row in contradictions(rows, rules_from(rows)) for name in row["calls"]}
            again = measure([probe for probe in chosen if probe.name in doubtful], 1, options.samples)
            measured |= {name: measured[name].joined(row) for name, row in again.items()}
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    rows = rows_of(chosen, measured)
    limits = (f", {name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    table = {
        "isa": here["isa"], "threads": here["threads"], "machine": machine_line(here) + "".join(limits),
        **judged(rows),
    }  # fmt: skip
    with replacing(options.out or crossover.FOLDER / f"{here['isa']}.json") as path:
        path.write_text(plain_text(table))
    print(text_of(table))
    return int(bool(contradictions(rows, rules_of(table))))
