"""The native code under sanitizers, and proofs that the tests see planted faults."""

import os
import re
import sys

import patience
import pytest
from native_build import ROOT, build_with_fault, run_tests, sanitizer_environment

pytestmark = pytest.mark.long

PARITY = "tests/ffnet_kernels/test_parity.py"
OTHERS = tuple(f"tests/ffnet_kernels/test_{name}.py" for name in ("conv2d", "programs", "training_operators"))
QUICK = "--hypothesis-profile=quick"

#: Faults are planted where the binding hands a call to the kernels, in what it tells them.
BINDING = "bindings/torch_cpu.cpp"
LAUNCH = "if (n > 0) ffnet::active_kernels().depthwise_conv2d(op, executor());"
FAULTS = {
    "a row is not written": "if (n > 0 && --op.out_h > 0) ffnet::active_kernels().depthwise_conv2d(op, executor());",
    "a column of the filter is lost": f"op.filter.kw -= op.filter.kw > 1; {LAUNCH}",
    "the map is one pixel off": f"op.pad_left += 1; {LAUNCH}",
}
#: The last row of a band is not gathered, and read as it was allocated.
BAND = ("cpu/row_ring.h", "map.stride, count, width_,", "map.stride, count - (count > 1), width_,")
#: Of rows that roll, one is lost before its last reader.
ROLLING = ("cpu/rows.h", "while (groups < row_groups<Taps>(kh))", "while (2 * groups < row_groups<Taps>(kh))")
BACKWARD_BINDING = "bindings/torch_cpu_backward.cpp"
CONVOLUTION_BACKWARD = "ffnet::active_kernels().depthwise_conv2d_backward(op, executor());"
ATTENTION_BACKWARD = "ffnet::active_kernels().ffnified_attention_backward(op, executor());"
BACKWARD_FAULTS = {
    "the gradient is one row off": (CONVOLUTION_BACKWARD, "op.pad_top += 1;"),
    "the activation's derivative is lost": (CONVOLUTION_BACKWARD, "op.activation = ffnet::Activation::none;"),
    "the layer scale is lost": (ATTENTION_BACKWARD, "op.scale = nullptr;"),
    "a column is lost": (ATTENTION_BACKWARD, "op.key_pad_left += 1;"),
}


def test_parity_under_sanitizers(tmp_path):
    environment = sanitizer_environment()
    build = [sys.executable, str(ROOT / "csrc" / "build.py"), "--sanitize", "--out", str(tmp_path)]
    built = patience.run(build)
    assert built.returncode == 0, built.stderr[-3000:]
    result = run_tests(tmp_path, PARITY, QUICK, environment=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "6 passed" in result.stdout
    result = run_tests(tmp_path, *OTHERS, QUICK, environment=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]


def test_sanitizers_see_a_read_past_the_end(tmp_path):
    environment = sanitizer_environment()
    library = build_with_fault(tmp_path, BINDING, LAUNCH, f"op.w += 1; {LAUNCH}", sanitize=True)
    code = """
import torch, ffnet_kernels as fk
with fk.use_backend("cpu"):
    fk.depthwise_conv2d(torch.ones(1, 3, 40, 40), torch.ones(3, 1, 5, 5))
"""
    environment = {**os.environ, **environment, "FFNET_KERNELS_LIBRARY_DIR": str(library)}
    result = patience.run([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert result.returncode == 99, result.stderr[-3000:]
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "csrc/cpu/layout.h" in result.stderr  # where rows are gathered


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Where one build after the other is made."""
    return tmp_path_factory.mktemp("workshop")


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees_a_fault(workshop, fault):
    library = build_with_fault(workshop, BINDING, LAUNCH, FAULTS[fault])
    result = run_tests(library, PARITY, QUICK, "-k", "depthwise")
    assert result.returncode == 1, (result.stdout + result.stderr)[-3000:]
    assert "over the limit" in result.stdout


def test_parity_sees_rows_that_are_lost(workshop):
    maps = "tests/ffnet_kernels/test_large_maps.py"
    result = run_tests(build_with_fault(workshop, *ROLLING), maps, "-k", "depthwise_conv2d-channels_last")
    assert result.returncode == 1, (result.stdout + result.stderr)[-3000:]
    assert "over the limit" in result.stdout


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_parity_sees_a_fault_in_a_gradient(workshop, fault):
    line, faulty = BACKWARD_FAULTS[fault]
    library = build_with_fault(workshop, BACKWARD_BINDING, line, f"{faulty} {line}")
    result = run_tests(library, "tests/ffnet_kernels/test_autograd.py", "-k", "test_gradients_against_float64")
    assert result.returncode == 1, (result.stdout + result.stderr)[-3000:]
    assert "AssertionError: argument" in result.stdout


def test_parity_sees_unwritten_scratch(workshop):
    result = run_tests(build_with_fault(workshop, *BAND), PARITY, QUICK, "-k", "depthwise_conv2d_gradients")
    assert result.returncode == 1, (result.stdout + result.stderr)[-3000:]
    # NaN of the first case drawn, or 0 where its activation is made of pieces, whose gradient is 0 at NaN.
    assert re.search(r"error \S+ over the limit", result.stdout)
