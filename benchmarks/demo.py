"""The demo: runs a model on photographs in every way, side by side. ``ffnet demo --help``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffnet import FFNet, create_model, list_models
from ffnet.commands.common import CommandError, picture_from
from ffnet.preprocess import preprocess
from ffnet_kernels import native

from .cases import ModelCase
from .charts import ChartError, latency_chart
from .contenders import CONTENDERS, EAGER, EAGER_NCHW, AsTrained, Contender
from .options import positive
from .report import busy_text, error_text, markdown, range_text, ratio_text
from .results import OURS, Result, Row, machine, machine_line, write_json
from .runner import Runner
from .work import SEED, ModelWork

TOP = 5
HEADERS = ("contender", "median ms", "quartiles", "busy", "time / ours", "error")


def run(options: argparse.Namespace) -> None:
    """Runs the demo, prints its tables and writes its files.

    Raises:
        CommandError: For a model, picture or checkpoint that cannot be read, or an output that cannot be written.
    """
    _require_writable(options.output)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = _model(options)
    images = options.image or _own_photographs()
    dtype: torch.dtype = getattr(torch, options.dtype)
    batches = [preprocess(picture_from(path), model.config, options.size)[None].to(dtype) for path in images]
    case = ModelCase(options.model, 1, batches[0].shape[-1], options.dtype)
    outcome = Runner(_contenders(options), options.samples).run(case, ModelWork(model.to(dtype), batches))

    outputs = {name: output.double() for name, output in outcome.outputs.items()}
    predictions = [
        {"image": str(path), **_prediction(outcome.expected[i], {name: output[i] for name, output in outputs.items()})}
        for i, path in enumerate(images)
    ]
    weights = str(options.checkpoint) if options.checkpoint else f"random, seed {SEED}"
    extra: dict[str, Any] = {"model": options.model, "weights": weights, "predictions": predictions}
    result = Result(machine(), [outcome.row], extra=extra)
    print(_text(result, options.samples))
    write_json(result, options.output / "demo.json")
    print(f"\nwrote {options.output / 'demo.json'}")
    try:
        path = options.output / "latency.png"
        latency_chart(outcome.row, path, f"{outcome.row.case}\n{machine_line(result.machine)}")
        print(f"wrote {path}")
    except ChartError as error:
        print(f"no chart: {error}", file=sys.stderr)
    print(f"\n{closing(outcome.row)}")


def _require_writable(folder: Path) -> None:
    """Checked before minutes of measuring, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror or error}") from error


def _model(options: argparse.Namespace) -> FFNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            return create_model(options.model, checkpoint=options.checkpoint).eval()
        except (OSError, ValueError, ImportError) as error:
            raise CommandError(str(error).splitlines()[0]) from error


def _own_photographs() -> list[Path]:
    # Found without importing the package, which takes seconds and loads a second OpenMP runtime.
    package = importlib.util.find_spec("sklearn")
    folder = Path(package.origin if package and package.origin else "").parent / "datasets" / "images"
    photographs = [folder / "china.jpg", folder / "flower.jpg"]
    if package is None or not all(path.is_file() for path in photographs):
        raise CommandError("the demo's own photographs come with scikit-learn: install it, or give --image")
    return photographs


def _contenders(options: argparse.Namespace) -> list[Contender]:
    compiled = [CONTENDERS["torch.compile"]] if options.compile else []
    return [CONTENDERS[OURS], CONTENDERS[EAGER_NCHW], CONTENDERS[EAGER], AsTrained(), *compiled]


def _prediction(expected: Tensor, logits: dict[str, Tensor]) -> dict[str, Any]:
    """Our best classes of a photograph, and how many of float64's best ones each contender names."""
    best = set(expected.topk(TOP).indices.tolist())
    agreement = {name: len(best & set(output.topk(TOP).indices.tolist())) for name, output in logits.items()}
    shown = logits.get(OURS, expected)  # ours may have failed, such as with a forced backend
    top = zip(*(values.tolist() for values in shown.softmax(0).topk(TOP)), strict=True)
    return {"top": [{"class": index, "probability": p} for p, index in top], "agreement": agreement}


def _text(result: Result, samples: int) -> str:
    (row,), predictions = result.rows, result.extra["predictions"]
    names = [Path(prediction["image"]).name for prediction in predictions]
    headers = [*HEADERS, *(f"top {TOP} {name}" for name in names)]
    lines = []
    for m in row.measurements:
        cells = ["-"] * (len(headers) - 1)
        if m.samples_ms:
            cells = [f"{m.median_ms:.2f}", range_text(m.quartiles_ms, 2), busy_text(m)]
            cells += [ratio_text(row.ratio(m.contender)), error_text(m)]
            cells += [f"{p['agreement'][m.contender]}/{TOP}" for p in predictions]
        lines.append((m.contender, *cells))
    parts = [
        f"{row.case}, weights: {result.extra['weights']}",
        machine_line(result.machine),
        markdown(headers, lines),
        f"Latency of one call, {samples} samples taken in turn; busy: those in which another process took a core; "
        f"error: of the logits against float64, over the largest; top {TOP}: how many of float64's {TOP} best classes "
        "are among the contender's.",
        *(f"{m.contender}: {m.reason}" for m in row.measurements if m.reason),
    ]
    if result.extra["weights"].startswith("random"):
        parts.append("The weights are random (no --checkpoint): the classes below mean nothing.")
    for name, prediction in zip(names, predictions, strict=True):
        best = (f"  {100 * t['probability']:6.2f} %  class {t['class']}" for t in prediction["top"])
        parts.append("\n".join([f"{name}, by {OURS}:", *best]))
    return "\n\n".join(parts)


def closing(row: Row) -> str:
    """Sums up the table, and says what to run next."""
    if reason := native.cpu_library_error():
        return (
            f"There are no kernels here, so plain PyTorch ran as ours, too: {reason} (`ffnet-kernels info` says more)."
        )
    ours, best = row.measurement(OURS), row.best_baseline()
    if ours is None:
        reason = next((m.reason for m in row.measurements if m.contender == OURS), None)
        return f"Ours did not run: {reason} (`ffnet-kernels info` says more)."
    command = "make bench" if __package__ == "benchmarks" else "ffnet-kernels bench"
    upcoming = f"Next: `{command}` measures every operator beside baselines, in minutes."
    ratio = row.ratio(best) if best else None
    if ratio is None:
        return upcoming
    compared = f"is {ratio:.2f} times as fast as" if ratio >= 1 else f"takes {1 / ratio:.2f} times as long as"
    numbers = "with the same numbers up to rounding" if ours.passed else "but with WRONG numbers"
    return f"With ffnet_kernels this model {compared} the best of the others, {best}, {numbers}. {upcoming}"


def _parser() -> argparse.ArgumentParser:
    demo = argparse.ArgumentParser(
        prog="ffnet demo",
        description="Classifies photographs with plain PyTorch, torch.compile and ffnet_kernels, and compares their "
        "latency, their error against float64 and their five best classes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add("--model", default="ffnet_1", help=f"one of {', '.join(list_models('classification'))}")
    add("--image", nargs="+", type=Path, metavar="PATH", help="photographs (none: two of scikit-learn's)")
    add("--checkpoint", type=Path, metavar="PATH", help="trained weights (none: random ones)")
    add("--size", type=_size, metavar="N", help="height and width of the input (none: the model's own)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="of the model")
    add("--threads", type=positive, metavar="N", help="threads (none: torch's own)")
    add("--samples", type=positive, default=20, metavar="N", help="time samples of each contender")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as a contender")
    add("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder of table, chart and results")
    return demo


def _size(text: str) -> int:
    size = positive(text)
    if size < 32:
        raise argparse.ArgumentTypeError(f"expected at least 32, the stride of the models, got {size}")
    return size


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 2 with one line on stderr where the options ask for something that is not there."""
    try:
        run(_parser().parse_args(argv))
    except CommandError as error:
        print(f"ffnet demo: {error}", file=sys.stderr)
        return 2
    return 0
