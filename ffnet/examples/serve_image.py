"""Classifies a photograph with an exported model, in Python and in C++: ``python -m ffnet.examples.serve_image``.

FFNet-1 is compiled by AOTInductor with the operators of ffnet_kernels and without; ``serving/classify.cpp``, which the
machine's C++ compiler builds, runs both on the picture of a flower that scikit-learn ships; so does ONNX Runtime in
Python, where it is installed. A table shows the latency for one picture, and how far probabilities are from plain
PyTorch's. Weights are random unless a checkpoint is given, which affects neither.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ffnet_kernels
from ffnet_kernels import native

from ..commands.common import CommandError, model_arguments
from ..commands.export import ONNX
from ..commands.profile import milliseconds
from ..registry import create_model

SOURCE = Path(__file__).with_name("serving") / "classify.cpp"


class Row(NamedTuple):
    """A row of the table: what ran, its latencies in milliseconds, and the largest difference of a probability."""

    name: str
    median: float
    p90: float
    difference: float

    def __str__(self) -> str:
        return f"{self.name:44} {self.median:10.3f} {self.p90:10.3f} {self.difference:12.2e}"


HEAD = f"{'one picture':44} {'median ms':>10} {'p90 ms':>10} {'difference':>12}"


def compile_program(out: Path) -> Path:
    """Builds the program in C++ with $CXX or c++, against the torch of this Python.

    Raises:
        CommandError: if there is no compiler, or it fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise CommandError(f"no C++ compiler: {compiler[0]} is not on the path ($CXX names another)")
    root = Path(torch.__file__).parent
    command = [
        *compiler, "-std=c++20", "-O2", str(SOURCE), "-isystem", str(root / "include"), "-o", str(out),
        f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10",
        "-ldl",
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise CommandError(f"{SOURCE.name} does not compile: {built.stderr.strip()[-2000:]}")
    return out


def classify(
    program: Path, model: Path, picture: Path, *, library: Path | None, threads: int, runs: int
) -> tuple[dict[int, float], float, float]:
    """Runs the C++ program and parses its output: probabilities by class, and median and 90 % latencies.

    Raises:
        CommandError: if it fails.
    """
    options = ["--threads", str(threads), "--runs", str(runs), *(["--library", str(library)] if library else [])]
    done = subprocess.run([program, model, picture, *options], capture_output=True, text=True)
    if done.returncode:
        raise CommandError(done.stderr.strip() or f"{program.name} ended with {done.returncode}")
    found = {int(index): float(value) for value, index in re.findall(r"^([\d.]+) class (\d+)$", done.stdout, re.M)}
    times = re.search(r"median ([\d.]+), p90 ([\d.]+)", done.stdout)
    assert times is not None
    return found, float(times[1]), float(times[2])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(HEAD)
            for row in rows(options, Path(folder)):
                print(row, flush=True)
    except (CommandError, OSError, ValueError) as error:
        print(f"serve_image: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m ffnet.examples.serve_image", description=__doc__)
    found.add_argument("--model", default="ffnet_1")
    found.add_argument("--model-arguments", default="{}", metavar="JSON", help="those of its class that differ")
    found.add_argument("--checkpoint", type=Path, metavar="FILE", help="trained weights; default: random ones")
    found.add_argument("--size", type=int, default=224, metavar="S", help="side of the picture (default 224)")
    found.add_argument("--image", type=Path, help="any picture Pillow reads; default: a flower of scikit-learn's")
    found.add_argument("--threads", type=int, default=1, metavar="N", help="of every row (default 1)")
    found.add_argument("--runs", type=int, default=30, metavar="N", help="pictures measured a row (default 30)")
    return found


def rows(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Measures and yields the table's rows; the program, the picture and the compiled models stay in the folder.

    Raises:
        CommandError: for wrong options, or without a C++ compiler.
    """
    if min(options.size, options.threads, options.runs) < 1:
        raise CommandError("expected --size, --threads and --runs of 1 or more")
    from ..folding import reparameterize
    from ..preprocess import load_image, normalised, resized
    from .photographs import photograph

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    arguments = model_arguments(options.model_arguments)
    model = reparameterize(create_model(options.model, checkpoint=options.checkpoint, **arguments).eval())
    if options.checkpoint is None:  # otherwise all classes would be about equally likely
        torch.nn.init.normal_(model.head.weight, std=0.5)
    image = load_image(options.image) if options.image else photograph("scikit-learn", "flower.jpg")
    image = resized(image, options.size, "bilinear")
    left, top = (image.width - options.size) // 2, (image.height - options.size) // 2
    image = image.crop((left, top, left + options.size, top + options.size))
    picture = folder / "picture.ppm"
    image.save(picture)
    x = normalised(image, model.config)[None]
    program = compile_program(folder / "classify")
    with torch.inference_mode():
        expected = model(x)[0].softmax(0)

        def row(name: str, call: Callable[[Tensor], Tensor]) -> Row:
            times = sorted(milliseconds(lambda: call(x), options.runs))
            worst = (call(x)[0].softmax(0) - expected).abs().max().item()
            return Row(name, statistics.median(times), times[math.ceil(0.9 * (len(times) - 1))], worst)

        yield row("Python, plain PyTorch", model)
        yield row("Python, ffnet_kernels.optimize", ffnet_kernels.optimize(model))
        ffnet_kernels.restore(model)
    library = native.library_dir() / native.CPU_LIBRARY if native.cpu_library_error() is None else None
    config = {**model.config, "input_size": (3, options.size, options.size)}
    for name, operators in (("plain", False), ("our operators", True)):
        if operators and library is None:
            continue
        path = folder / f"{name.replace(' ', '_')}.pt2"
        path.write_bytes(_compiled(model, x, config, operators))
        with torch.inference_mode():
            yield row(f"Python, AOTInductor, {name}", torch._inductor.aoti_load_package(str(path)))
        found, median, p90 = classify(
            program, path, picture, library=library if operators else None, threads=options.threads, runs=options.runs
        )
        worst = max(abs(probability - expected[index].item()) for index, probability in found.items())
        yield Row(f"C++, AOTInductor, {name}", median, p90, worst)
    if all(importlib.util.find_spec(name) for name in (*ONNX, "onnxruntime")):
        with torch.inference_mode():
            yield row("Python, ONNX Runtime", _in_onnxruntime(model, x, options.threads))


def _in_onnxruntime(model: Any, x: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    exported = torch.onnx.export(
        ffnet_kernels.export(model, x, operators=False), (x.clone(),), dynamo=True, verbose=False
    )
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), options)
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _compiled(model: Any, x: Tensor, config: dict[str, Any], operators: bool) -> bytes:
    from ..commands.export import compiled

    return compiled(ffnet_kernels.export(model, x, operators=operators), config)


if __name__ == "__main__":
    sys.exit(main())
