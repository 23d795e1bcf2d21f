"""``python -m ffnet_kernels info | selftest``."""

from __future__ import annotations

import argparse
import json
import sys
import time

from .info import format_info, info
from .selftest import Check, selftest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ffnet_kernels", description="Inspect and check the kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="versions, instruction sets, libraries, backends and why any is missing")
    show.add_argument("--json", action="store_true", help="as JSON")
    check = commands.add_parser("selftest", help="check every built kernel against the float64 reference")
    check.add_argument("--verbose", action="store_true", help="print every check, not only failures")
    options = parser.parse_args(argv)
    if options.command == "info":
        print(json.dumps(info(), indent=2) if options.json else format_info())
        return 0
    return _selftest(options.verbose)


def _selftest(verbose: bool) -> int:
    def report(check: Check) -> None:
        if verbose or not check.passed:
            verdict = "ok  " if check.passed else "FAIL"
            print(f"{verdict} {check.backend}/{check.variant}: {check.case}: "
                  f"error {check.error:.1e} (plain PyTorch {check.eager_error:.1e})")  # fmt: skip

    start = time.perf_counter()
    checks = selftest(report)
    failed = sum(not check.passed for check in checks)
    variants = sorted({f"{check.backend}/{check.variant}" for check in checks})
    print(f"selftest: {len(checks)} checks of {', '.join(variants) or 'no kernel (reference only)'} "
          f"in {time.perf_counter() - start:.1f} s")  # fmt: skip
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
