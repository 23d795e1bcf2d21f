"""`python tools/wheel.py FOLDER DIST`: the one wheel of FOLDER into DIST, with the oldest manylinux tag that holds.

auditwheel reads which versions of glibc and libstdc++ the native code needs; a wheel for older ones takes an older
system to build on. Nothing is put into the wheel: a static libstdc++ of a newer system asks for its newer glibc
(measured with GCC 12 on Debian 12: 2.36 where 2.34 will do), and the threads are torch's: one OpenMP in a process.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = ["libtorch*.so", "libc10*.so"]  # ffnet_kernels imports torch, which loads them, before its own libraries


def tag(wheel: Path, out: Path) -> str | None:
    """Writes the wheel with its manylinux tag; returns None, or why there is none."""
    if wheel.name.endswith("-any.whl"):
        return "it holds no native library"
    if importlib.util.find_spec("auditwheel") is None:
        return "auditwheel is not installed (pip install auditwheel)"
    command = [sys.executable, "-m", "auditwheel", "repair", "--patcher", "none", "--wheel-dir", str(out), str(wheel)]
    result = subprocess.run([*command, *(f"--exclude={name}" for name in TORCH)], capture_output=True, text=True)
    return f"auditwheel refuses: {result.stderr.strip()}" if result.returncode else None


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    (wheel,) = folder.glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    for earlier in out.glob(f"{wheel.name.split('-')[0]}-*.whl"):
        earlier.unlink()
    reason = tag(wheel, out)
    if reason is not None:
        print(f"wheel: no manylinux tag: {reason}", file=sys.stderr)
        shutil.copy(wheel, out)
    (written,) = out.glob("*.whl")
    print(f"{written}  {written.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
