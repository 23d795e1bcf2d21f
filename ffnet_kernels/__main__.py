"""``ffnet-kernels demo | bench | info | selftest | tune | aot | traffic``, or ``python -m ffnet_kernels``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch

from . import suite
from .backends import choice
from .info import format_info, info
from .selftest import BACKENDS, Check, selftest

#: What `bench` runs by default; takes minutes.
QUICK_BENCH = ["run", "--quick", "--passes", "1"]


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return suite.interruptible("ffnet-kernels", lambda: _run(arguments, may_restart=argv is None))


def _run(arguments: list[str], may_restart: bool) -> int:
    if arguments[:1] == ["demo"]:
        return suite.run("ffnet-kernels demo", arguments, may_restart=may_restart)
    if arguments[:1] == ["bench"]:
        given = arguments[1:]
        if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
            given = QUICK_BENCH + given
        return suite.run("ffnet-kernels bench", given, may_restart=may_restart)
    parser = argparse.ArgumentParser(prog="ffnet-kernels", description="Try, measure, inspect and check the kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="FFNet on photographs, with plain PyTorch beside it")
    commands.add_parser(
        "bench", help="the quick benchmark suite, with its options; or another of its commands (bench --help)"
    )
    show = commands.add_parser("info", help="versions, instruction sets, libraries, backends and why any is missing")
    show.add_argument("--json", action="store_true", help="as JSON")
    check = commands.add_parser("selftest", help="check every built kernel against the float64 reference")
    check.add_argument("--verbose", action="store_true", help="print every check, not only failures")
    check.add_argument("--backend", choices=BACKENDS, help="only this one; also where it runs on the CPU for tests")
    check.add_argument("--filter", default="", metavar="TEXT", help="only cases with this text in their names")
    tuning = commands.add_parser("tune", help="measure the tiles of the Triton kernels on this GPU, keep the fastest")
    tuning.add_argument("--quick", action="store_true", help="bfloat16 at the largest batch only")
    tuning.add_argument("--again", action="store_true", help="measure also what was measured before")
    tuning.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (default: the package's own)")
    ahead = commands.add_parser("aot", help="compile the Triton kernels for GPUs that need not be here")
    ahead.add_argument("--dtypes", default="bf16,fp16,fp32", help="default: %(default)s")
    ahead.add_argument("--architectures", default="80,90,100", help="of NVIDIA; default: %(default)s")
    commands.add_parser("traffic", help="count the bytes that the Triton kernels move, interpreted on the CPU")
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(json.dumps(info(), indent=2) if options.json else format_info())
        return 0
    if options.command == "tune":
        return _tune(options.quick, options.again, options.out)
    if options.command == "aot":
        return _aot(options.dtypes.split(","), [int(number) for number in options.architectures.split(",")])
    if options.command == "traffic":
        return _traffic()
    return _selftest(options.verbose, options.backend, options.filter)


def _selftest(verbose: bool, backend: str | None, text: str) -> int:
    """Returns 0; 1 where a check failed, 2 where the backend is not available."""

    def report(check: Check) -> None:
        if verbose or not check.passed:
            verdict = "ok  " if check.passed else "FAIL"
            print(f"{verdict} {check.backend}/{check.variant}: {check.case}: "
                  f"error {check.error:.1e} (plain PyTorch {check.eager_error:.1e})")  # fmt: skip

    start = time.perf_counter()
    try:
        checks = selftest(report, backend=backend, text=text)
    except choice.BackendError as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 2
    failed = sum(not check.passed for check in checks)
    variants = sorted({f"{check.backend}/{check.variant}" for check in checks})
    print(f"selftest: {len(checks)} checks of {', '.join(variants) or 'no kernel (reference only)'} "
          f"in {time.perf_counter() - start:.1f} s")  # fmt: skip
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _aot(dtypes: list[str], architectures: list[int]) -> int:
    """Returns 0; 1 where a kernel spills or is too large, 2 where none can be compiled here."""
    if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
        print("aot: needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    from .backends.triton import aot

    return aot.main(dtypes, architectures)


def _traffic() -> int:
    """Returns 0; 1 where an operator moves too much, 2 where kernels are not interpreted here."""
    reason = choice.why_unavailable("triton")
    if reason or os.environ.get("TRITON_INTERPRET") != "1":
        print(f"traffic: {reason or 'set TRITON_INTERPRET=1: it is the interpreter that counts'}", file=sys.stderr)
        return 2
    from .backends.triton import interpreter, traffic

    interpreter.mend()
    return traffic.main()


def _tune(quick: bool, again: bool, folder: Path | None) -> int:
    """Returns 0; 1 if it could not continue, 2 if there is nothing to tune, 130 after Ctrl-C."""
    reason = choice.why_unavailable("triton") if torch.cuda.is_available() else "there is no GPU"
    if reason:
        print(f"tune: {reason}", file=sys.stderr)
        return 2
    from .backends.triton import tune  # only once Triton is known to be installed

    device = torch.device("cuda", torch.cuda.current_device())
    try:
        tune.tune(device, folder, tune.calls(quick), tune.ColdClock(device), again=again)
    except KeyboardInterrupt:
        print("tune: interrupted; what was measured is kept, the next run goes on", file=sys.stderr)
        return 130
    except (tune.DeviceLostError, OSError) as error:
        print(f"tune: {error}; what was measured is kept, the next run goes on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
