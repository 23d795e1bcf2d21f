"""``ffnet export``: a model as a file that can be served without the model's code."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import warnings
from pathlib import Path
from typing import Any

from .common import CommandError, add_model_options, input_size_of, model_from, new_file, require_place

FORMATS = ("pt2", "aoti", "onnx")
ONNX = ("onnx", "onnxscript")  # what torch's exporter imports


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("export", help="a model as a program: torch.export, AOTInductor or ONNX")
    parser.add_argument("out", type=Path, metavar="FILE", help="what is written: a .pt2, with --format onnx an .onnx")
    add_model_options(parser, None, trained=False)
    parser.add_argument(
        "--format", choices=FORMATS, default="pt2",
        help="pt2: of torch.export; aoti: compiled for this machine by AOTInductor, for Python and C++; onnx",
    )  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="PyTorch's operators only; onnx has no others")
    parser.add_argument("--size", type=int, metavar="S", help="side of the model's input; default: the model's own")
    parser.add_argument("--batch", type=int, metavar="N", help="so many images in every call; default: any number")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import torch

    for name in ("size", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise CommandError(f"expected --{name} of 1 or more, got {getattr(options, name)}")
    suffix = ".onnx" if options.format == "onnx" else ".pt2"
    if options.out.suffix != suffix:
        raise CommandError(f"expected a file name that ends in {suffix} for --format {options.format}: {options.out}")
    if options.format == "onnx" and (missing := [name for name in ONNX if importlib.util.find_spec(name) is None]):
        raise CommandError(f"--format onnx needs {' and '.join(missing)} (pip install {' '.join(ONNX)})")
    require_place(options.out)
    model = model_from(options, None)
    config = {**model.config, "input_size": input_size_of(model, options.size)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about parts of itself
        content = _exported(model, config, options)
    with new_file(options.out) as file:
        file.write(content)
    number = "any number of" if options.batch is None else options.batch
    what = "images" if len(config["input_size"]) == 3 else "series"
    print(
        f"wrote {options.out}: {options.format}, {len(content) / 1e6:.1f} MB, for {number} {what} of "
        f"{'x'.join(map(str, config['input_size']))}"
    )
    return 0


def _exported(model: Any, config: dict[str, Any], options: argparse.Namespace) -> bytes:
    """The content of the file. Errors such as a bad size are reported to the user."""
    import torch

    import ffnet_kernels

    example = torch.randn(options.batch or 2, *config["input_size"], generator=torch.Generator().manual_seed(0))
    operators = not options.plain and options.format != "onnx"
    try:
        program = ffnet_kernels.export(model, example, operators=operators, dynamic_batch=options.batch is None)
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"cannot export {options.model}: {str(error).splitlines()[0]}") from error
    buffer = io.BytesIO()
    if options.format == "pt2":
        torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config, default=str)})
    elif options.format == "aoti":
        buffer.write(compiled(program, config))
    else:
        shapes = None if options.batch else ({0: torch.export.Dim("batch")},)
        exported = torch.onnx.export(program, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert exported is not None
        buffer.write(exported.model_proto.SerializeToString())
    return buffer.getvalue()


def compiled(program: Any, config: dict[str, Any]) -> bytes:
    """An AOTInductor package whose metadata tells a C++ program how to preprocess pictures.

    Raises:
        CommandError: if there is no C++ compiler.
    """
    import torch

    words = {key: " ".join(map(str, config[key])) for key in ("input_size", "mean", "std") if key in config}
    buffer = io.BytesIO()
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=buffer, inductor_configs={"aot_inductor.metadata": words}
        )
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise CommandError(f"AOTInductor needs a C++ compiler: {error}") from error
    return buffer.getvalue()
