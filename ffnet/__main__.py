"""``python -m ffnet list | demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import count_macs, count_parameters, create_model, list_models, reparameterize

INTERRUPTED = 130  # as shells report a process that Ctrl-C ended


class UserError(Exception):
    """Something the user can put right; the text says what."""


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 with one line on stderr where the options ask for something that is not there."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "list":
            _list()
        else:
            _demo(options)
    except UserError as error:
        print(f"ffnet {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ffnet {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _list() -> None:
    print(f"{'model':10}{'parameters':>14}{'as trained':>14}{'input':>10}{'MACs':>12}")
    for name in list_models():
        model = create_model(name, device="meta")
        fused = reparameterize(model, extra_folds=False)  # the form whose parameters are published
        size = model.config["input_size"]
        print(
            f"{name:10}{count_parameters(fused):14,}{count_parameters(model):14,}{size[-1]:>6}x{size[-2]}"
            f"{count_macs(fused, size) / 1e9:10.3f} G"
        )


def _demo(options: argparse.Namespace) -> None:
    try:
        from . import demo  # here, since it needs the benchmarks and they need this package
    except ImportError as error:
        raise UserError(f"{error} (pip install 'ffnet-kernels[demo]' brings what the demo needs)") from error
    if options.json is not None and options.json.is_dir():
        raise UserError(f"--json {options.json}: is a folder")
    settings = demo.Settings(
        model=options.model,
        images=tuple(options.image),
        checkpoint=options.checkpoint,
        labels=options.labels,
        size=options.size,
        batch=options.batch,
        dtype=options.dtype,
        threads=options.threads,
        samples=options.samples,
        compile=options.compile,
        output=options.output,
        json=options.json,
    )
    try:
        demo.run(settings)
    except demo.DemoError as error:
        raise UserError(error) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ffnet", description="FFNet image classifiers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the models with their parameters and multiply-adds")
    demo = commands.add_parser(
        "demo",
        help="classify photographs with every way to run a model, and time them side by side",
        description="Classifies photographs with plain PyTorch, torch.compile and ffnet_kernels, and compares their "
        "latency, their error against float64 and their five best classes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", default="ffnet_1", help=f"one of {', '.join(list_models())}")
    demo.add_argument(
        "--image", nargs="+", type=Path, default=[], metavar="PATH", help="photographs (none: two of scikit-learn's)"
    )
    demo.add_argument("--checkpoint", type=Path, metavar="PATH", help="trained weights (none: random ones)")
    demo.add_argument("--labels", type=Path, metavar="PATH", help="names of the classes, one a line")
    demo.add_argument("--size", type=_size, metavar="N", help="height and width of the input (none: the model's own)")
    demo.add_argument("--batch", type=_positive, default=1, metavar="N", help="photographs a call")
    demo.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="of the model")
    demo.add_argument("--threads", type=_positive, metavar="N", help="threads (none: torch's own)")
    demo.add_argument("--samples", type=_positive, default=20, metavar="N", help="time samples of each contender")
    demo.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as a contender"
    )
    demo.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder of the results")
    demo.add_argument("--json", type=Path, metavar="FILE", help="the results as data (none: demo.json in the folder)")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def _size(text: str) -> int:
    size = _positive(text)
    if size < 32:
        raise argparse.ArgumentTypeError(f"expected at least 32, the stride of the models, got {size}")
    return size


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        from benchmarks.heap import restart_with_plain_heap

        restart_with_plain_heap()
    sys.exit(main())
