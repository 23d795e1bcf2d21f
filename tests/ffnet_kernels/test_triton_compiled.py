"""The Triton kernels as a GPU would get them: compiled ahead of time in a process that does not interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]


def run(code: str) -> list:
    """What a script prints as JSON in its last line."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


SURVEY = """
import json, torch
from ffnet_kernels.backends.triton import aot
rows = aot.survey([torch.bfloat16], [90])
print(json.dumps([[row.kernel, row.architecture, row.dtype, row.complaint()] for row in rows]))
"""


def test_no_tile_spills():
    """In bfloat16 for sm_90; `python -m ffnet_kernels aot` compiles the other dtypes and architectures too."""
    rows = run(SURVEY)
    assert not [row for row in rows if row[3]]
    assert len({row[0] for row in rows}) == 12
    assert len(rows) > 160


SPILLING = """
import json, torch
from ffnet_kernels.backends.triton import aot, attention, configs, launch
x = torch.empty(8, 320, 32, 32, dtype=torch.bfloat16, device="meta")
weight, vector = torch.empty(320, 1, 7, 7, dtype=x.dtype, device="meta"), torch.empty(320, dtype=x.dtype, device="meta")
tile = configs.RowTile(32, 32, 16, 4)
with launch.recording() as found, configs.choosing(lambda shape, tiles: tile):
    attention.forward(torch.empty_like(x), x, weight, vector, weight, vector, "gelu", vector, x)
print(json.dumps([aot.compile_launch(found[0], 90)[0].complaint()]))
"""


def test_a_tile_that_spills_is_found():
    (complaint,) = run(SPILLING)
    assert "spills" in complaint


PORTABLE = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from ffnet_kernels.backends.triton import aot, launch
spilled = {}
for one in aot.launches([torch.bfloat16]):
    if one.kernel.__name__ not in spilled:
        options = launch.options(one.warps, one.stages, nvidia=False)
        code = triton.compile(aot.source_of(one), target=GPUTarget("hip", "gfx942", 64), options=options).asm["amdgcn"]
        spilled[one.kernel.__name__] = [line for line in code.splitlines() if "vgpr_spill_count" in line]
print(json.dumps(list(spilled.items())))
"""


def test_kernels_compile_for_another_vendor():
    kernels = run(PORTABLE)
    assert len(kernels) == 12
    for name, counts in kernels:
        assert counts, name
        assert all(line.split()[-1] == "0" for line in counts), name


def test_kernels_hold_nothing_of_one_vendor():
    for source in (ROOT / "ffnet_kernels/backends/triton").glob("*.py"):
        assert "inline_asm" not in source.read_text(), source
        assert "libdevice" not in source.read_text(), source


LAUNCHED = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from ffnet_kernels.backends.triton import aot, attention, depthwise, launch, mixer

class Driver:  # of a GPU that is not there: enough for all of a launch but its last step
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)

driver.set_active(Driver())
compared = []

def launched(kernel, grid, device, *, warps, stages=1, **arguments):
    arguments, options = launch.aligned(arguments), launch.options(warps, stages, nvidia=True)
    compiled = kernel.warmup(grid=(grid,), **arguments, **options)
    ahead = aot.compile_launch(launch.Launch(kernel, grid, arguments, warps, stages), 90)[1]
    compared.append([kernel.__name__, compiled.asm["cubin"] == ahead])

for module in (attention, depthwise, mixer):
    module.launch = launched
x = torch.empty(2, 88, 16, 16, dtype=torch.bfloat16, memory_format=torch.channels_last)
weight, vector, matrix = x.new_empty(88, 1, 7, 7), x.new_empty(88), x.new_empty(88, 88)
args = x, weight, vector, weight, vector, "gelu", vector, x
attention.forward(torch.empty_like(x), *args)
attention.backward(x, *args, (True,) * 7)
depthwise.backward(x, x, weight, vector, (1, 1), (3, 3, 3, 3), "gelu", (True,) * 3)
args = x, weight, vector, matrix, vector, matrix, vector, "gelu", vector, x
mixer.forward(torch.empty_like(x), *args)
mixer.backward(x, *args, (True,) * 9)
print(json.dumps(compared))
"""


def test_what_is_compiled_ahead_is_what_is_launched():
    """Triton's own handling of arguments, with a stand-in for the driver, gives the same machine code."""
    compared = run(LAUNCHED)
    assert len({name for name, _ in compared}) >= 10
    assert not [name for name, same in compared if not same]


TRAFFIC = """
import json, torch
from ffnet_kernels.backends.triton import interpreter, traffic
interpreter.mend()
rows = [traffic.measure(name, "nchw", 640, 8, 7) for name in traffic.operators()]
print(json.dumps([[row.operator, row.ratio] for row in rows]))
"""


def test_depthwise_operators_move_little_more_than_they_must():
    """Of the stage with the smallest maps, where filters and partial sums weigh most; the others are a command."""
    rows = run("import os; os.environ['TRITON_INTERPRET'] = '1'" + TRAFFIC)
    assert len(rows) == 5
    for operator, ratio in rows:
        assert 1 < ratio <= 1.25, operator
