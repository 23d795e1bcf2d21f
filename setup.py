"""Builds the native libraries (csrc/build.py) into ``ffnet_kernels/lib``; the metadata is in pyproject.toml.

pip install --no-build-isolation .        # with the torch that is installed
pip install --no-build-isolation -e .     # editable
make wheel                                # dist/*.whl, for other machines

The native code is made for this machine; csrc/build.py lists the environment variables that say otherwise.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SUITE = "ffnet_benchmarks"  # what the folder benchmarks is installed as: others have packages of that name, too


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
        # One folder of objects for editable installs and wheels: what did not change is not compiled again.
        reason = load_builder().build(package / "ffnet_kernels" / "lib", ROOT / "build" / "native", cuda=True)
        if reason:
            print(f"ffnet-kernels: installed without native kernels: {reason}", file=sys.stderr)

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "ffnet_kernels" / "lib").glob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


class AnyPython(bdist_wheel):
    """One wheel for every Python 3 of a platform: the operators know no Python ABI, and other Pythons pass by the
    benchmarks' helper, which does. One for every platform where nothing was built."""

    def get_tag(self):
        native = any(Path(self.bdist_dir).rglob("*.so"))
        return "py3", "none", super().get_tag()[2] if native else "any"


class SourceDistribution(sdist):
    """With the commit, which an unpacked archive cannot ask git for."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        builder = load_builder()
        Path(base_dir, "csrc", builder.COMMIT_FILE).write_text(f"{builder.source_commit(ROOT / 'csrc')}\n")


setup(
    packages=[
        "ffnet_kernels",
        "ffnet_kernels.backends",
        "ffnet_kernels.backends.triton",
        "ffnet_kernels.lib",
        "ffnet_kernels.ops",
        "ffnet_kernels.patterns",
        "ffnet",
        "ffnet.commands",
        "ffnet.examples",
        "ffnet.train",
        SUITE,
    ],
    package_dir={SUITE: "benchmarks"},
    include_package_data=False,  # results of record stay in the repository
    package_data={
        "ffnet_kernels": ["py.typed"],
        "ffnet_kernels.backends": ["crossovers/*.json"],
        "ffnet_kernels.backends.triton": ["tuned/*.json"],
        "ffnet_kernels.lib": ["*.so", "build_record.json"],
        "ffnet": ["py.typed"],
        "ffnet.examples": ["serving/*.cpp"],
    },
    ext_modules=[Extension("ffnet_kernels.lib._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython, "sdist": SourceDistribution},
)
