"""The demo: photographs through every way to run a model, side by side. ``ffnet demo --help``."""

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

from ffnet import FFNet, create_model, list_models, load_checkpoint
from ffnet.preprocess import load_image, preprocess
from ffnet_kernels import native

from .cases import ModelCase, positive
from .charts import ChartError, latency_chart
from .contenders import CONTENDERS, OURS, AsTrained, Contender
from .report import busy_text, error_text, markdown, ratio_text
from .results import Result, Row, machine, machine_line, write_json
from .runner import Runner
from .work import ModelWork

SEED = 0
TOP = 5
HEADERS = ("contender", "median ms", "quartiles", "busy", "time / ours", "error")


class DemoError(Exception):
    """The settings ask for something that is not there; the text says what, in one line."""


def run(settings: argparse.Namespace) -> Result:
    """Runs the demo, prints its tables and writes its files.

    Raises:
        DemoError: For a model, picture, checkpoint or labels that cannot be read, or an output that cannot be written.
    """
    json_path = settings.json or settings.output / "demo.json"
    for folder in (settings.output, json_path.parent):
        _require_writable(folder)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = _model(settings)
    labels = _labels(settings, model)
    images = list(settings.image) or _own_photographs()
    photographs = torch.stack([_photograph(path, model, settings.size) for path in images])

    dtype: torch.dtype = getattr(torch, settings.dtype)
    work = ModelWork(model.to(dtype), _batches(photographs.to(dtype), settings.batch))
    case = ModelCase(settings.model, settings.batch, photographs.shape[-1], settings.dtype)
    outcome = Runner(_contenders(settings), settings.samples).run(case, work)

    # The last batch may be filled up with photographs that come a second time.
    logits = {name: output[: len(images)].double() for name, output in outcome.outputs.items()}
    predictions = _predictions(images, logits, outcome.expected[: len(images)], labels)
    weights = str(settings.checkpoint) if settings.checkpoint else f"random, seed {SEED}"
    extra: dict[str, Any] = {"model": settings.model, "weights": weights, "predictions": predictions}
    result = Result(machine(), [outcome.row], extra=extra)
    print(_text(result, settings))
    write_json(result, json_path)
    print(f"\nwrote {json_path}")
    try:
        path = settings.output / "latency.png"
        latency_chart(outcome.row, path, f"{outcome.row.case}\n{machine_line(result.machine)}")
        print(f"wrote {path}")
    except ChartError as error:
        print(f"no chart: {error}", file=sys.stderr)
    print(f"\n{closing(outcome.row)}")
    return result


def _require_writable(folder: Path) -> None:
    """Found out before minutes of measuring, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DemoError(f"cannot write to {folder}: {error.strerror or error}") from error


def _model(settings: argparse.Namespace) -> FFNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            model = create_model(settings.model)
        except ValueError as error:
            raise DemoError(f"unknown model: {error}") from error
    if settings.checkpoint:
        try:
            load_checkpoint(model, settings.checkpoint)
        except (OSError, ValueError, ImportError) as error:
            raise DemoError(str(error).splitlines()[0]) from error
    return model.eval()


def _labels(settings: argparse.Namespace, model: FFNet) -> list[str] | None:
    if settings.labels is None:
        return None
    try:
        labels = settings.labels.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"cannot read the labels {settings.labels}: {_reason(error)}") from error
    if len(labels) != model.num_classes:
        raise DemoError(f"{settings.labels}: expected {model.num_classes} lines, one a class, got {len(labels)}")
    return labels


def _own_photographs() -> list[Path]:
    # Found without importing it, which takes seconds and loads a second OpenMP runtime.
    package = importlib.util.find_spec("sklearn")
    folder = Path(package.origin if package and package.origin else "").parent / "datasets" / "images"
    photographs = [folder / "china.jpg", folder / "flower.jpg"]
    if package is None or not all(path.is_file() for path in photographs):
        raise DemoError("the demo's own photographs come with scikit-learn: install it, or give --image")
    return photographs


def _photograph(path: Path, model: FFNet, size: int | None) -> Tensor:
    try:
        image = load_image(path)
    except OSError as error:
        raise DemoError(f"cannot read the image {path}: {_reason(error)}") from error
    return preprocess(image, model.config, size)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _batches(photographs: Tensor, batch: int) -> list[Tensor]:
    """All photographs in batches of one size, the last filled up from the start."""
    count = -(-len(photographs) // batch) * batch
    return list(photographs[torch.arange(count) % len(photographs)].split(batch))


def _contenders(settings: argparse.Namespace) -> list[Contender]:
    names = (OURS, "eager nchw", "eager channels-last", "torch.compile")
    *contenders, compiled = [CONTENDERS[name] for name in names]
    return [*contenders, AsTrained(), *([compiled] if settings.compile else [])]


def _predictions(
    images: list[Path], logits: dict[str, Tensor], expected: Tensor, labels: list[str] | None
) -> list[dict[str, Any]]:
    """Per photograph: our best classes, and how many of float64's best ones each contender names."""
    predictions = []
    for i, path in enumerate(images):
        best = set(expected[i].topk(TOP).indices.tolist())
        agreement = {name: len(best & set(output[i].topk(TOP).indices.tolist())) for name, output in logits.items()}
        shown = logits.get(OURS, expected)  # ours may have failed: a forced backend refuses what it does not take
        probabilities, classes = shown[i].softmax(0).topk(TOP)
        top = [
            {"class": index, "name": labels[index] if labels else None, "probability": probability}
            for index, probability in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]
        predictions.append({"image": str(path), "top": top, "agreement": agreement})
    return predictions


def _text(result: Result, settings: argparse.Namespace) -> str:
    (row,) = result.rows
    predictions = result.extra["predictions"]
    names = [Path(prediction["image"]).name for prediction in predictions]
    lines = []
    for m in row.measurements:
        if not m.samples_ms:
            lines.append((m.contender, *["-"] * (len(HEADERS) - 1 + len(names))))
            continue
        first, third = m.quartiles_ms
        agreement = [f"{prediction['agreement'][m.contender]}/{TOP}" for prediction in predictions]
        latency = (f"{m.median_ms:.2f}", f"{first:.2f}..{third:.2f}", busy_text(m), ratio_text(row, m))
        lines.append((m.contender, *latency, error_text(m), *agreement))
    headers = [*HEADERS, *(f"top {TOP} {name}" for name in names)]
    parts = [
        f"{row.case}, weights: {result.extra['weights']}",
        machine_line(result.machine),
        markdown(headers, lines),
        f"Latency of one call, {settings.samples} samples taken in turn; busy: those in which another process took a "
        f"core; error: of the logits against float64, over the largest; top {TOP}: how many of float64's {TOP} best "
        "classes are among the contender's.",
        *(f"{m.contender}: {m.reason}" for m in row.measurements if m.reason),
    ]
    if settings.checkpoint is None:
        parts.append("The weights are random (no --checkpoint): the classes below mean nothing.")
    for name, prediction in zip(names, predictions, strict=True):
        best = (f"  {100 * t['probability']:6.2f} %  class {t['class']} {t['name'] or ''}" for t in prediction["top"])
        parts.append("\n".join([f"{name}, by {OURS}:", *(line.rstrip() for line in best)]))
    return "\n\n".join(parts)


def closing(row: Row) -> str:
    """What the table says of ours, and what to run next."""
    command = "make bench" if __package__ == "benchmarks" else "ffnet-kernels bench"
    upcoming = f"Next: `{command}` measures every operator beside baselines, in minutes."
    if reason := native.cpu_library_error():
        return (
            f"There are no kernels here, so plain PyTorch ran as ours, too: {reason} (`ffnet-kernels info` says more)."
        )
    ours = row.measurement(OURS)
    if ours is None:
        reason = next((m.reason for m in row.measurements if m.contender == OURS), None)
        return f"Ours did not run: {reason} (`ffnet-kernels info` says more)."
    others = (m.contender for m in row.measurements if m is not ours)
    ratios = {name: ratio for name in others if (ratio := row.ratio(name, OURS)) is not None}
    if not ratios:
        return upcoming
    best = min(ratios, key=lambda name: ratios[name])
    ratio = ratios[best]
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
    text = "photographs (none: two of scikit-learn's)"
    add("--image", nargs="+", type=Path, default=[], metavar="PATH", help=text)
    add("--checkpoint", type=Path, metavar="PATH", help="trained weights (none: random ones)")
    add("--labels", type=Path, metavar="PATH", help="names of the classes, one a line")
    add("--size", type=_size, metavar="N", help="height and width of the input (none: the model's own)")
    add("--batch", type=positive, default=1, metavar="N", help="photographs a call")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="of the model")
    add("--threads", type=positive, metavar="N", help="threads (none: torch's own)")
    add("--samples", type=positive, default=20, metavar="N", help="time samples of each contender")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as a contender")
    add("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder of the results")
    add("--json", type=Path, metavar="FILE", help="the results as data (none: demo.json in the folder)")
    return demo


def _size(text: str) -> int:
    size = positive(text)
    if size < 32:
        raise argparse.ArgumentTypeError(f"expected at least 32, the stride of the models, got {size}")
    return size


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 2 with one line on stderr where the options ask for something that is not there."""
    options = _parser().parse_args(argv)
    try:
        if options.json is not None and options.json.is_dir():
            raise DemoError(f"--json {options.json}: is a folder")
        run(options)
    except DemoError as error:
        print(f"ffnet demo: {error}", file=sys.stderr)
        return 2
    return 0
