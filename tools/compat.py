"""`python tools/compat.py WHEEL VERSION...`: one wheel under several versions of torch ("newest": pip's choice).

For each, a virtual environment outside the source tree (kept, and used again for the same versions of Python and torch)
gets this very wheel; in an empty folder there, the installed package must pass its selftest and tools/smoke.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py")
TORCH_AND_CUDA = "import torch; print(torch.__version__, torch.version.cuda or '(none)')"


def run(*command: str | Path, **options) -> str:
    """What a command prints; raises CalledProcessError, whose text holds all of it."""
    foreign = ("FFNET_", "PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return subprocess.run(
        list(map(str, command)), env=environment, check=True, text=True, stdout=subprocess.PIPE, **options
    ).stdout


def newest(python: str) -> str:
    """The version of torch that pip would install."""
    options = ("--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-")
    answer = json.loads(run(python, "-m", "pip", "install", *options, "torch"))
    return answer["install"][0]["metadata"]["version"]


def environment(python: str, version: str, home: Path) -> Path:
    """The interpreter of the virtual environment with this torch, made if there is none."""
    minor = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    folder = home / f"ffnet-compat-python-{minor}-torch-{version}"
    interpreter, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        run(interpreter, "-m", "pip", "install", "--quiet", f"torch=={version}", "numpy")
        ready.touch()
    return interpreter


def check(interpreter: Path, wheel: Path) -> str:
    """Installs the wheel and tries it; returns the selftest's verdict."""
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    with tempfile.TemporaryDirectory() as empty:
        # Isolated: neither this folder nor the source tree is on the path.
        package = (interpreter, "-I", "-m", "ffnet_kernels")
        print(run(*package, "info", cwd=empty))
        verdict = run(*package, "selftest", cwd=empty)
        print(verdict, run(interpreter, "-I", SMOKE, cwd=empty), sep="")
    first, last = verdict.strip().splitlines()
    return f"{last}; {first.removeprefix('selftest: ')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--python", default=sys.executable, help="of which the environments are made")
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()), help="folder of the environments")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    versions = dict.fromkeys(newest(options.python) if v == "newest" else v for v in options.versions)
    failed, summary = False, []
    for version in versions:
        print(f"---- torch {version}", flush=True)
        name = f"torch {version}"
        try:
            interpreter = environment(options.python, version, options.home)
            torch, cuda = run(interpreter, "-c", TORCH_AND_CUDA).split()
            python = run(interpreter, "-c", "import platform; print(platform.python_version())").strip()
            name = f"torch {torch}, CUDA {cuda}, Python {python}"
            summary.append(f"ok    {name}: {check(interpreter, wheel)}")
        except subprocess.CalledProcessError as error:
            print(error.stdout)
            failed = True
            summary.append(f"FAIL  {name}: {' '.join(map(str, error.cmd[1:]))} exits with {error.returncode}")
    print(f"---- {wheel.name}", *summary, sep="\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
