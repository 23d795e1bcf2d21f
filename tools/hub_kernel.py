"""Writes the layers of hub/ as a repository of the Hub's kernel format: ``python tools/hub_kernel.py OUT``.

A variant ``build/torch-<backend>`` is the Python of ``hub/torch-ext`` with the package ``ffnet_kernels``, its native
libraries included, beside it, and ``metadata.json``. ``kernels.LocalLayerRepository(OUT, layer_name=…)`` loads it; to
publish it is for its owner.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("cpu", "cuda")


def write(out: Path) -> list[Path]:
    """Writes every variant anew, and returns their folders."""
    general = tomllib.loads((ROOT / "hub" / "build.toml").read_text())["general"]
    name = general["name"].replace("-", "_")
    skipped = shutil.ignore_patterns("__pycache__", "_native*.so", "objects")
    variants = []
    for backend in BACKENDS:
        variant = out / "build" / f"torch-{backend}"
        if variant.exists():
            shutil.rmtree(variant)
        shutil.copytree(ROOT / "hub" / "torch-ext" / name, variant, ignore=skipped)
        package = variant / "packages" / "ffnet_kernels"
        shutil.copytree(ROOT / "ffnet_kernels", package, ignore=skipped)
        if backend == "cpu":
            (package / "lib" / "libffnet_kernels_cuda.so").unlink(missing_ok=True)
        metadata = {
            "name": general["name"],
            "id": f"_{name}_{backend}_{general['version']}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    shutil.copy(ROOT / "hub" / "build.toml", out)
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the layers as a repository of the Hub's kernel format.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, made where it is not there")
    out = parser.parse_args().out
    if out.exists() and not out.is_dir():
        sys.exit(f"hub_kernel: {out} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    for variant in write(out):
        print(f"wrote {variant}")


if __name__ == "__main__":
    main()
