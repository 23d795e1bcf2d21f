"""The quick tests once more as on processors that have less than this one."""

import platform
import re

import parity
import pytest
from native_build import ROOT, run_tests

from ffnet_kernels import native

pytestmark = [
    pytest.mark.long,
    parity.needs_native,
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="has one instruction set"),
]

#: What our kernels, torch's and oneDNN's are to take the processor for.
MACHINES = {
    "avx2": {"FFNET_KERNELS_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "baseline": {"FFNET_KERNELS_ISA": "baseline", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
#: Kernels of GPUs, commands, docs and files are the same on all of them.
ALIKE = ("cuda", "triton", "tune", "machines", "train_", "docs", "serve", "pretrained", "commands", "scale", "build")
FILES = [
    str(path)
    for folder in ("ffnet_kernels", "ffnet")
    for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))
    if not any(word in path.name for word in ALIKE)
]


#: Of these, what computes with kernels or chooses between them. The rest is Python, which is the same where there is no
#: AVX2 as with it.
OF_KERNELS = (
    "parity", "conv", "gradients", "determinism", "nonfinite", "shapes", "steps", "training_operators", "norm_mixer",
    "raw_operators", "autograd", "autocast", "large_maps", "programs", "optimize_kinds", "dispatch", "selftest",
    "export", "test_model.py", "folding", "dense", "family",
)  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_as_on_a_processor_that_has_less(machine):
    if machine not in parity.ISAS:
        pytest.skip(f"this processor has no {machine}")
    if machine == native.isa():
        pytest.skip(f"this processor has no more than {machine}")
    files = [file for file in FILES if machine != "baseline" or any(word in file for word in OF_KERNELS)]
    arguments = ("-m", "not long", "--hypothesis-profile=quick", *files)
    result = run_tests(native.library_dir(), *arguments, environment=MACHINES[machine])
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert not re.search(r"no tests ran|\b0 passed", result.stdout)
