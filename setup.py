"""Builds the native libraries (csrc/build.py) into ``ffnet_kernels/lib``; the metadata is in pyproject.toml.

pip install --no-build-isolation .        # with the torch that is installed
pip install --no-build-isolation -e .     # editable
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_builder():
    spec = importlib.util.spec_from_file_location("ffnet_kernels_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Hands the one "extension" to csrc/build.py: a failed native build leaves a package that runs its reference."""

    def run(self):
        if importlib.util.find_spec("torch") is None:
            sys.exit(
                "ffnet-kernels: torch is not installed in this environment. Install torch 2.11 or newer first, then "
                "`pip install --no-build-isolation .`, which builds against it."
            )
        package = ROOT if self.inplace else Path(self.build_lib)
        # An editable build is repeated at every change: its objects stay, where setuptools would begin anew.
        work = ROOT / "build" / "native" if self.inplace else Path(self.build_temp) / "native"
        reason = load_builder().build(package / "ffnet_kernels" / "lib", work, cuda=True)
        if reason:
            print(f"ffnet-kernels: installed without native kernels: {reason}", file=sys.stderr)

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "ffnet_kernels" / "lib").glob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


setup(
    packages=[
        "ffnet_kernels",
        "ffnet_kernels.backends",
        "ffnet_kernels.backends.triton",
        "ffnet_kernels.lib",
        "ffnet",
        "benchmarks",
    ],
    package_data={
        "ffnet_kernels": ["py.typed"],
        "ffnet_kernels.backends.triton": ["tuned/*.json"],
        "ffnet_kernels.lib": ["*.so", "build_record.json"],
        "ffnet": ["py.typed"],
    },
    ext_modules=[Extension("ffnet_kernels.lib._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
