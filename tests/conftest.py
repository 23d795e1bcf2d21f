"""Runs the tests against this checkout, with hypothesis profiles that make every run the same."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Idle threads sleep: on cores that others use they would keep waiting for the ones that do not run. Read by OpenMP when
# torch loads it, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).parents[1]
CUDA_HOST = ROOT / "build" / "cuda_host" / "libffnet_kernels_cuda_host.so"  # made by `make test`
# pytest puts tests/ on the path, where tests/ffnet_kernels would pass for a namespace package of that name.
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Triton kernels run on CPU tensors; read on import
    if CUDA_HOST.exists():
        os.environ.setdefault("FFNET_KERNELS_CUDA_HOST", str(CUDA_HOST))  # and so do the CUDA kernels

_COMMON = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
_ONCE = [Phase.explicit, Phase.generate]  # a failing case is repeated as it is; "thorough" shrinks it first
settings.register_profile("standard", max_examples=100, phases=_ONCE, **_COMMON)
settings.register_profile("quick", max_examples=20, phases=_ONCE, **_COMMON)  # `make test`, and under sanitizers
settings.register_profile("thorough", max_examples=3000, **{**_COMMON, "derandomize": False})
settings.load_profile("standard")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: not run by `make test`, but by `make test-all`")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small maps gain nothing from more, which on busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
