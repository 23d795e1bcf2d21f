"""Loads libraries that were built against one torch into another, as `make compat` runs it: no GPU is needed."""

import subprocess
import sys

import torch

from ffnet_kernels import native


def operators(library: str, key: str) -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n for n in names if n.startswith(library) and torch._C._dispatch_has_kernel_for_dispatch_key(n, key))


def main() -> None:
    subprocess.run([sys.executable, "-m", "ffnet_kernels", "info"], check=True)
    built, here = native.build_record().get("torch"), torch.__version__
    print(f"\nbuilt against torch {built}, loaded in torch {here} with CUDA {torch.version.cuda}")
    failures = []
    for name, error in (("CPU", native.cpu_library_error()), ("CUDA", native.cuda_library_error())):
        found = operators("ffnet_kernels", name)
        print(f"{name}: {error or ', '.join(found) or 'no operators'}")
        if error or not found:
            failures.append(name)
    x = torch.randn(2, 16, 16, 16)
    weight = torch.randn(16, 1, 7, 7)
    if "CPU" not in failures:
        result = torch.ops.ffnet_kernels.depthwise_conv2d(x, weight, None, [1, 1], [3, 3, 3, 3], "none")
        torch.testing.assert_close(result, torch.nn.functional.conv2d(x, weight, padding=3, groups=16))
    sys.exit(f"does not work: {', '.join(failures)}" if failures else 0)


if __name__ == "__main__":
    main()
