"""What an installed package must do, away from its source; `tools/compat.py` runs it. Needs nothing but torch and the
package. A CUDA library is loaded where torch has CUDA; no GPU is needed."""

import sys
from pathlib import Path

import torch

import ffnet
import ffnet_kernels as fk
from ffnet_kernels import native

BUILD_RECORD = {"commit", "compiler", "flags", "isas", "torch", "torch_target_version"}


def operators(key: str) -> list[str]:
    """Our operators with a kernel of their own for a dispatch key."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ffnet_kernels")]
    return sorted(name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


def check_origin() -> None:
    for module in (fk, ffnet):
        assert Path(module.__file__).is_relative_to(sys.prefix), f"imported from {module.__file__}"


def check_libraries() -> None:
    record = native.build_record()
    assert record.keys() >= BUILD_RECORD, f"the build record lacks {BUILD_RECORD - record.keys()}"
    assert native.cpu_library_error() is None, native.cpu_library_error()
    found = {"CPU": operators("CPU"), "CUDA": operators("CUDA")}
    if "cuda" in record and torch.version.cuda is not None:
        assert native.cuda_library_error() is None, native.cuda_library_error()
        assert "ffnet_kernels_cuda::depthwise_conv2d" in found["CUDA"]
    for name in ("conv2d", "depthwise_conv2d", "ffnified_attention", "channel_mixer"):
        assert f"ffnet_kernels::{name}" in found["CPU"]
    print(", ".join(f"{len(names)} operators for {key}" for key, names in found.items()))


def check_call() -> None:
    x, weight, bias = torch.randn(2, 16, 16, 16), torch.randn(16, 1, 7, 7), torch.randn(16)
    decision = fk.explain(fk.depthwise_conv2d, x, weight, bias)
    assert decision.backend == "cpu", decision
    result = fk.depthwise_conv2d(x, weight, bias)
    torch.testing.assert_close(result, torch.nn.functional.conv2d(x, weight, bias, padding=3, groups=16))
    print(decision.variant)


def check_model() -> None:
    model = ffnet.create_model("ffnet_1", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, logits = model(images), fk.optimize(model)(images)
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, error
    assert any(row.is_fused for row in fk.report(model).rows), fk.report(model)
    print(f"an optimised FFNet-1 differs by {error:.1e} of the largest logit")


if __name__ == "__main__":
    torch.manual_seed(0)
    for check in (check_origin, check_libraries, check_call, check_model):
        check()
