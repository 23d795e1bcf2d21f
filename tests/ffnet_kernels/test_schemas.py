"""The schemas of operators: one place has them, and the library alone, or Python alone, defines all of them."""

import os
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import torch

from ffnet_kernels import native
from ffnet_kernels.ops import _operator, schemas

ON_CPU = {name: texts for name, texts in schemas.by_namespace().items() if name != "ffnet_kernels_cuda"}


def parsed(namespace: str, text: str) -> str:
    return str(torch._C.parse_schema(f"{namespace}::{text}"))


def run(code: str, **environment: str) -> str:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, **environment},
    ).stdout  # fmt: skip


PRINT = """
for name, texts in {found!r}.items():
    for text in texts:
        operator = getattr(getattr(torch.ops, name), text.partition("(")[0]).default
        print(operator._schema, torch.Tag.pt2_compliant_tag in operator.tags)
"""


def expected(namespaces: dict[str, list[str]]) -> list[str]:
    return [f"{parsed(name, text)} True" for name, texts in namespaces.items() for text in texts]


@parity.needs_native
def test_the_library_alone_defines_and_runs_them():
    library = native.library_dir() / native.CPU_LIBRARY
    out = run(f"import ctypes, torch\nctypes.CDLL({str(library)!r})\n" + PRINT.format(found=ON_CPU) + """
out = torch.ops.ffnet_kernels.depthwise_conv2d(torch.ones(1, 8, 5, 5), torch.ones(8, 1, 3, 3), None, [1, 1], [1] * 4, "none")
assert out[0, 0, 2, 2] == 9
import sys
assert not [name for name in sys.modules if name.startswith("ffnet")]
""")  # fmt: skip  # noqa: E501
    tags = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
    assert out.splitlines() == [line if tags else line.replace(" True", " False") for line in expected(ON_CPU)]


def test_python_alone_defines_them(tmp_path):
    code = "import torch, ffnet_kernels\nassert 'cpu' not in ffnet_kernels.available_backends()\n"
    out = run(
        code + PRINT.format(found=schemas.by_namespace()),
        FFNET_KERNELS_LIBRARY_DIR=str(tmp_path),
        FFNET_KERNELS_CUDA_HOST="",
    )
    assert out.splitlines() == expected(schemas.by_namespace())


def test_another_versions_schema_is_refused():
    library = torch.library.Library("ffnet_kernels_another_version", "DEF")
    library.define("conv2d(Tensor x) -> Tensor")
    assert _operator.define(library, "conv2d(Tensor x) -> Tensor").name() == "ffnet_kernels_another_version::conv2d"
    with pytest.raises(RuntimeError, match=r"another version.*expected .*Tensor x, Tensor w.*, got .*Tensor x\)"):
        _operator.define(library, "conv2d(Tensor x, Tensor w) -> Tensor")
