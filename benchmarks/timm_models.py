"""timm models with depthwise convolutions, plain and optimised, in both layouts: ``python -m benchmarks timm``.

Each model runs in a process of its own, so that a failure affects no other: random weights, eval mode, float32, batch
1, at timm's input size for it. The four contenders are timed alternately (`runner`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ffnet
from ffnet_kernels import dynamo
from ffnet_kernels.selftest import error_limit

from . import memory
from .contenders import CONTENDERS, EAGER, EAGER_NCHW, Contender, Ours, TorchCompile
from .options import names, numbers, parser_of, positive
from .report import SLOWER, WRONG, markdown, range_text
from .results import Result, Row, machine, machine_line, write_json
from .runner import INTERRUPTED, Runner, progress
from .work import MEMORY_FORMATS, SEED, ModelWork, Program, Wrap, as_is

MODELS = (
    "mobilenetv1_100", "mobilenetv2_050", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mobilenetv4_conv_medium", "mobilenetv4_conv_large", "mobilenetv4_hybrid_medium",
    "mobilenet_edgetpu_v2_xs", "efficientnet_b0", "efficientnet_b1", "efficientnet_lite0", "tf_efficientnet_lite0",
    "tf_efficientnet_lite1", "tf_efficientnetv2_b0", "mnasnet_100", "semnasnet_100", "fbnetc_100", "fbnetv3_b",
    "spnasnet_100", "hardcorenas_a", "lcnet_050", "lcnet_100", "tinynet_a", "tinynet_c", "mixnet_s", "mixnet_m",
    "rexnet_100", "ghostnet_100", "ghostnetv2_100", "repghostnet_100", "hgnetv2_b0", "xception41",
    "convnext_atto", "convnext_atto_ols", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny",
    "convnextv2_atto", "convnextv2_nano", "inception_next_atto", "inception_next_tiny", "rdnet_tiny", "starnet_s1",
    "starnet_s2", "mambaout_femto", "mambaout_kobe", "repvit_m0_9", "repvit_m1", "mobileone_s0", "mobileone_s1",
    "fastvit_t8", "fastvit_t12", "fastvit_sa12", "edgenext_xx_small", "edgenext_small", "efficientformerv2_s0",
    "efficientformerv2_s1", "efficientvit_b0", "efficientvit_b1", "efficientvit_m0", "shvit_s1", "swiftformer_xs",
    "mobilevit_xxs", "mobilevitv2_050", "mobilevitv2_100", "convformer_s18", "caformer_s18", "focalnet_tiny_srf",
    "coatnet_pico_rw_224", "maxvit_pico_rw_256", "tiny_vit_5m_224", "pvt_v2_b0", "coat_lite_tiny",
    "xcit_nano_12_p16_224", "davit_tiny", "gcvit_xxtiny",
)  # fmt: skip
PLAIN = (EAGER_NCHW, EAGER)
OPTIMIZED = ("optimize nchw", "optimize channels-last")
#: Backends of torch.compile, plain and ours, by contender.
COMPILED = {"inductor": "inductor", "our backend": "ffnet_kernels"}
#: A ratio below it is more than noise on a quiet machine.
NOT_SLOWER = 0.97
HEADERS = (
    "model", "input", *PLAIN, *OPTIMIZED, "nchw", "channels-last", "best / best", "quartiles", "error / eager", "",
)  # fmt: skip
NOTE = (
    "Milliseconds of each contender (medians), and eager time over optimised time (median, round by round): in either "
    "layout, and of the faster eager layout over the faster optimised one. error / eager: largest error against "
    "float64, the worse of both optimised layouts over the worse of both eager ones; more than twice that, but for "
    f"four roundings of the largest output, is marked {WRONG}, and a ratio below {NOT_SLOWER} {SLOWER}."
)
SAMPLES, SAMPLE_SECONDS = 9, 0.03
#: Seconds after which a case on a busy machine ends with fewer samples.
CASE_SECONDS = 60
#: Seconds after which a model's process is considered to hang.
LONGEST = 600.0


@dataclass(frozen=True)
class TimmCase:
    """A forward pass of a model on one image, on a number of threads."""

    model: str
    size: int
    threads: int
    flops: int
    bytes: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.size}x{self.size} b1 {self.threads} thread{'s' * (self.threads > 1)}"


class TimmWork(ModelWork):
    """A model as timm makes it; for plain PyTorch nothing in it is folded."""

    def plain(self, layout: str, wrap: Wrap = as_is) -> Program:
        return self.as_trained(layout, wrap)

    def error_limit(self, expected: Tensor, eager: Tensor) -> float:
        # If rounding is amplified, either layout may be the better one by chance.
        other = self.plain("channels_last").outputs()
        return max(error_limit(expected, eager), error_limit(expected, other))


def build(name: str) -> TimmWork:
    """The model and its input, the same in every run."""
    import timm

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = timm.create_model(name, pretrained=False).eval()
        image = torch.randn(1, *model.pretrained_cfg["input_size"])
        randomize(model, image)
    return TimmWork(model, [image])


def randomize(model: nn.Module, image: Tensor) -> None:
    """Gives norms, biases and layer scales values as if trained: a fresh model has ones, zeros and scales of 1e-6
    there, which would hide errors in folding.

    A batch norm divides by about the root mean square of its input. Each channel's own statistics would amplify small
    differences between pixels, faint channels, and every rounding, layer by layer.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == max(parameter.shape, default=1):  # one number per channel
            if name.endswith(("bias", "beta", "shift")):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)

    def settle(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        square = inputs[0].square().mean()
        norm.running_mean.normal_().mul_(0.1 * square.sqrt())  # type: ignore[operator]
        norm.running_var.uniform_(0.5, 1.5).mul_(square)  # type: ignore[operator]

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    model(image)
    for hook in hooks:
        hook.remove()


def measure(name: str, threads: Sequence[int], samples: int, *, compiled: bool = False) -> Result:
    """Measures a model in this process, a row for each number of threads."""
    work = build(name)
    (image,) = work.batches
    flops = 2 * ffnet.count_macs(work.model, tuple(image.shape[1:]))
    moved = 4 * (ffnet.count_parameters(work.model) + image.numel())
    contenders: list[Contender] = [CONTENDERS[contender] for contender in PLAIN]
    contenders += [Ours(contender, layout) for contender, layout in zip(OPTIMIZED, MEMORY_FORMATS, strict=True)]
    if compiled:
        # By name, our backend is known only if the package is installed.
        backends = {**COMPILED, "our backend": dynamo.backend}
        contenders += [TorchCompile(name, arguments={"backend": b, "fullgraph": True}) for name, b in backends.items()]
    runner = Runner(contenders, samples, CASE_SECONDS, SAMPLE_SECONDS)
    result = Result(machine())
    for number in threads:
        torch.set_num_threads(number)
        result.rows.append(runner.run(TimmCase(name, image.shape[-1], number, flops, moved), work).row)
    return result


def in_fresh_process(name: str, options: argparse.Namespace) -> Result | str:
    """Like `measure`; if that fails, returns why."""
    arguments = ["timm", "--one", name, "--threads", ",".join(map(str, options.threads)), "--samples", options.samples]
    try:
        plain = memory.in_fresh_process(*arguments, *["--compiled"] * options.compiled, seconds=LONGEST)
    except RuntimeError as error:
        return str(error)
    return Result.from_plain(plain)


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if a model failed or was wrong, 2 if timm is not installed, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        version = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        print("benchmarks timm: timm is not installed; `make timm` makes an environment that has it", file=sys.stderr)
        return 2
    if options.one:
        print(json.dumps(measure(options.one, options.threads, options.samples, compiled=options.compiled).to_plain()))
        return 0
    here = {**machine(), "threads": " and ".join(map(str, options.threads))}
    result = Result(here, extra={"timm": version, "failed": {}})
    try:
        with progress(len(options.models), "models", leave=True) as bar:
            for name in options.models:
                bar.set_description_str(name)
                measured = in_fresh_process(name, options)
                if isinstance(measured, str):
                    result.extra["failed"][name] = measured
                else:
                    result.rows += measured.rows
                if options.out:
                    write_json(result, options.out)
                bar.update()
    except KeyboardInterrupt:
        result.interrupted = True
    print(report(result))
    if options.out:
        write_json(result, options.out)
        print(f"\nwrote {options.out}")
    if result.interrupted:
        return INTERRUPTED
    return int(bool(failures(result)) or not all(map(agrees, result.rows)))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("timm", __doc__.splitlines()[0])
    add, text = parser.add_argument, f"of timm (default: {len(MODELS)} of them)"
    add("--models", type=names, default=MODELS, metavar="NAME,NAME", help=text)
    add("--threads", type=numbers, default=(1, 2), metavar="N,N", help="one table each (default: 1,2)")
    add("--samples", type=positive, default=SAMPLES, metavar="N", help="a contender (%(default)s)")
    add("--compiled", action="store_true", help="torch.compile as well, by inductor and by our backend")
    add("--out", type=Path, metavar="FILE", help="write the results there, after every model")
    add("--one", metavar="MODEL", help=argparse.SUPPRESS)
    return parser


# The results as Markdown text: a table for each number of threads.


def fastest(row: Row, names: Sequence[str]) -> str | None:
    """The fastest of those that ran."""
    ran = [measurement for name in names if (measurement := row.measurement(name))]
    return min(ran, key=lambda measurement: measurement.median_ms).contender if ran else None


def gain(row: Row) -> float | None:
    """Time of the faster eager layout over that of the faster optimised layout."""
    eager, ours = fastest(row, PLAIN), fastest(row, OPTIMIZED)
    return row.ratio(eager, ours) if eager and ours else None


def agrees(row: Row) -> bool:
    """Whether every optimised model that ran is as accurate as plain PyTorch."""
    return all(m.passed for name in (*OPTIMIZED, "our backend") if (m := row.measurement(name)))


def table(rows: Sequence[Row]) -> str:
    """A line per model, the largest gain first."""
    return markdown(HEADERS, [_line(row) for row in sorted(rows, key=lambda row: gain(row) or 0.0, reverse=True)])


def compiled_table(rows: Sequence[Row]) -> str:
    """A line for each model that torch.compile ran."""
    lines = []
    for row in rows:
        if any(row.measurement(name) for name in COMPILED):
            times = [f"{m.median_ms:.2f}" if (m := row.measurement(name)) else "-" for name in COMPILED]
            ratio, wrong = row.ratio(*COMPILED), any(m and not m.passed for m in map(row.measurement, COMPILED))
            lines.append((row.parameters["model"], *times, f"{ratio:.2f}×" if ratio else "-", WRONG if wrong else ""))
    return markdown(("model, torch.compile", *COMPILED, "ratio", ""), lines) if lines else ""


def _line(row: Row) -> tuple[str, ...]:
    measurements = [row.measurement(name) for name in (*PLAIN, *OPTIMIZED)]
    ratios = [row.ratio(*pair) for pair in zip(PLAIN, OPTIMIZED, strict=True)]
    eager, ours, best = fastest(row, PLAIN), fastest(row, OPTIMIZED), gain(row)
    between = row.ratio_quartiles(eager, ours) if eager and ours else None
    errors = _worst_error(row, PLAIN), _worst_error(row, OPTIMIZED)
    return (
        row.parameters["model"], f"{row.parameters['size']}²",
        *(f"{m.median_ms:.2f}" if m else "-" for m in measurements),
        *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios),
        f"{SLOWER if best < NOT_SLOWER else ''} {best:.2f}×".lstrip() if best else "-",
        range_text(between, 2, "–") if between else "-",
        f"{errors[1] / errors[0]:.2f}" if errors[0] and errors[1] is not None else "-", "" if agrees(row) else WRONG,
    )  # fmt: skip


def _worst_error(row: Row, names: Sequence[str]) -> float | None:
    """None if nothing ran, or an output is not finite."""
    errors = [m.error for name in names if (m := row.measurement(name))]
    return max(errors) if errors and None not in errors else None  # type: ignore[type-var]


def gains_of(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """Speed-up and name of each model, the least first."""
    return sorted((ratio, row.parameters["model"]) for row in rows if (ratio := gain(row)))


def by_threads(result: Result) -> dict[int, list[Row]]:
    """The rows of each number of threads."""
    found: dict[int, list[Row]] = {}
    for row in result.rows:
        found.setdefault(row.parameters["threads"], []).append(row)
    return dict(sorted(found.items()))


def mean_of(gains: Sequence[tuple[float, str]]) -> float:
    return statistics.geometric_mean(ratio for ratio, _ in gains)


def summary(rows: Sequence[Row]) -> str:
    """A summary of the table."""
    gains = [(ratio, row.parameters["model"]) for row in rows if (ratio := gain(row))]
    if not gains:
        return "nothing was measured"
    slower = [name for ratio, name in gains if ratio < NOT_SLOWER]
    wrong = [row.parameters["model"] for row in rows if not agrees(row)]
    means = [f"{mean_of(gains):.2f}× best against best"]
    for title, *pair in zip(("NCHW", "channels-last"), PLAIN, OPTIMIZED, strict=True):
        if ratios := [ratio for row in rows if (ratio := row.ratio(*pair))]:
            means.append(f"{statistics.geometric_mean(ratios):.2f}× in {title}")
    return (
        f"{len(gains)} models, geometric mean {', '.join(means)}; "
        f"below {NOT_SLOWER}: {len(slower)}{_listed(slower)}; outputs that disagree: {len(wrong)}{_listed(wrong)}"
    )


def overview(result: Result) -> str:
    """A line for each number of threads: mean, smallest and largest gain."""
    lines = []
    for threads, rows in by_threads(result).items():
        gains = gains_of(rows)
        ends = [f"{ratio:.2f}× ({name})" for ratio, name in (gains[0], gains[-1])]
        below = sum(ratio < NOT_SLOWER for ratio, _ in gains)
        lines.append((str(threads), str(len(gains)), f"{mean_of(gains):.2f}×", *ends, str(below)))
    headers = ("threads", "models", "geometric mean", "least", "greatest", f"below {NOT_SLOWER}")
    return f"{machine_line(result.machine)}, timm {result.extra['timm']}:\n\n{markdown(headers, lines)}"


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def failures(result: Result) -> list[str]:
    """A line for each model that failed, and for each contender of one."""
    failed = [f"{name}: {reason}" for name, reason in result.extra["failed"].items()]
    return failed + [
        f"{row.case}: {m.contender}: {m.reason}" for row in result.rows for m in row.measurements if m.reason
    ]


def report(result: Result) -> str:
    """Machine, a table and a summary for each number of threads, and what failed."""
    parts = [f"machine: {machine_line(result.machine)}, timm {result.extra['timm']}", NOTE]
    for threads, rows in by_threads(result).items():
        parts += filter(None, [f"## Threads: {threads}", table(rows), summary(rows), compiled_table(rows)])
    if lines := failures(result):
        parts += ["## Failed", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts)
