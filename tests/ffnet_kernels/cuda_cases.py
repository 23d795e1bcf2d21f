"""Cases of the CUDA kernels, as the host execution runs them, and what it tells of a run.

They are made for the branches of csrc/cuda: every width of an access to a row (16, 8, 4 and 2 bytes), maps of one
window of 8 columns, of several and of strips; filters of both heights that kernels are compiled for; planes cut into
segments of rows, which few channels on many multiprocessors give, and several panels for a warp, which few
multiprocessors give; planes of the heights whose schedule is compiled into a kernel.
"""

import contextlib
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
import triton_cases
from hypothesis import strategies as st
from parity import Case, Sizes

from ffnet_kernels import native
from ffnet_kernels.backends import cuda
from ffnet_kernels.backends.cuda import ACTIVATIONS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES, HALVES = (F32, F16, BF16), (F16, BF16)
LAST = "channels_last"

_REASON = cuda.unavailable() if native.cuda_host_library() else "FFNET_KERNELS_CUDA_HOST is not set"
needs_host = pytest.mark.skipif(bool(_REASON), reason=f"no CUDA kernels for the processor: {_REASON}")
on_the_host = native.cuda_host_library() is not None and _REASON is None


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For plain PyTorch: the maps are small, and two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def machine(
    schedule: str = "forward",
    seed: int = 0,
    *,
    architecture: int = 90,
    multiprocessors: int = 2,
    resident_blocks: int = 3,
) -> Iterator[None]:
    """The GPU that the host execution pretends to be, and the order in which its threads take turns."""
    select = torch.ops.ffnet_kernels_cuda.select_host
    select(schedule, seed, architecture, multiprocessors, resident_blocks)
    try:
        yield
    finally:
        select("forward", 0, 90, 2, 3)


@functools.cache
def kernels_by_address() -> dict[int, str]:
    """The kernels of the library with their template arguments, by the place of their code."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    command = ["nm", "-C", str(native.cuda_host_library())]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = re.sub(r"\(anonymous namespace\)::|ffnet::", "", symbols)
    found = re.findall(r"^(\w+) t void (\w+_kernel<.*>)\([\w<> ]*\)$", symbols, re.MULTILINE)
    return {int(address, 16): name for address, name in found}


def started_kernels() -> frozenset[str]:
    """The kernels that were started since the last call."""
    lines = torch.ops.ffnet_kernels_cuda.started_kernels().splitlines()
    return frozenset(kernels_by_address()[int(line.split("\t")[1], 16)] for line in lines)


def started_blocks(kernel: str) -> set[int]:
    """Of the grids that kernels of that name were started with since the last call."""
    lines = [line.split("\t") for line in torch.ops.ffnet_kernels_cuda.started_kernels().splitlines()]
    return {int(blocks) for name, _, blocks in lines if name == kernel}


# ---- tables: name -> (operator, options of `triton_cases.made` and of `machine`) ----

Table = dict[str, tuple[str, dict]]
CONVOLUTIONS = ("depthwise_conv2d", "ffnified_attention")

PLANES = {
    "one window": (17, 2, 11, 8),
    "one narrow window": (3, 2, 9, 5),
    "two windows": (5, 3, 10, 16),
    "three windows": (3, 2, 12, 24),
    "rows of pairs": (2, 3, 7, 14),
    "rows of fours": (3, 2, 10, 28),
    "odd rows": (3, 2, 9, 11),
    "eight windows": (1, 2, 20, 64),
    "strips": (1, 2, 9, 72),
    "many strips": (2, 1, 5, 130),
    "strips of odd rows": (1, 2, 6, 101),
    "high": (1, 2, 37, 40),
}
LOW_FILTERS = ((3, 3), (1, 1), (2, 3), (3, 9), (3, 2), (1, 8))
HIGH_FILTERS = ((7, 7), (5, 5), (4, 4), (7, 9), (6, 2), (5, 8))


def _planes() -> Table:
    table: Table = {}
    for i, (name, shape) in enumerate(PLANES.items()):
        for kernel in (LOW_FILTERS[i % 6], HIGH_FILTERS[(i + i // 6) % 6]):
            for j, operator in enumerate(CONVOLUTIONS):
                options = {"shape": shape, "kernel": kernel, "activation": ACTIVATIONS[(i + j) % len(ACTIVATIONS)]}
                table[f"{operator} of {name}, {kernel[0]}x{kernel[1]}"] = operator, options
    return table


def _machines() -> Table:
    table: Table = {}
    segments = {(1, 2, 40, 16): (3, 3), (1, 1, 33, 100): (7, 7), (1, 3, 25, 13): (4, 5), (2, 1, 33, 8): (6, 2)}
    panels = {(50, 5, 6, 8): (3, 3), (9, 17, 7, 16): (7, 7), (33, 6, 6, 5): (5, 4), (3, 20, 6, 70): (2, 2)}
    for operator in CONVOLUTIONS:
        for shape, kernel in segments.items():
            for k in (kernel, (3, 5), (7, 3)):
                options = {"shape": shape, "kernel": k, "multiprocessors": 132}
                table[f"{operator}, segments of {shape}, {k[0]}x{k[1]}"] = operator, options
        for shape, kernel in panels.items():
            options = {"shape": shape, "kernel": kernel, "multiprocessors": 1}
            table[f"{operator}, panels of {shape}"] = operator, options
    return table


#: Whole planes whose schedule the compiler knows: by filter, windows and rows of the plane (schedule.h). Smooth
#: activations have kernels, and so have none and ReLU.
KNOWN_ROWS = {
    (7, "alone"): [(8, 8)],
    (7, "aligned"): [(16, 16), (14, 16), (28, 24), (15, 16), (29, 72), (18, 16), (32, 24)],
    (7, "linear"): [(14, 14), (35, 28), (14, 28), (7, 7)],
    (7, "any"): [(14, 10), (7, 13), (8, 7), (12, 28)],
    (3, "aligned"): [(13, 16), (28, 24), (14, 16), (17, 72)],
    (3, "linear"): [(13, 28), (28, 28)],
    (3, "any"): [(13, 14)],
}


def _known_rows() -> Table:
    table: Table = {}
    for (k, _), planes in KNOWN_ROWS.items():
        for i, (h, w) in enumerate(planes):
            # A warp does a panel and a part of another, whose first rows come while the last of that are worked on.
            images = 2 * (8 // min(8, -(-w // 8))) + 1 if w <= 64 else 2
            options = {"shape": (images, 4, h, w), "multiprocessors": 1, "resident_blocks": 1}
            smooth, kernel = ("gelu", "silu", "gelu_tanh")[i % 3], (k - i % 2, k)
            for operator, activation in [
                (CONVOLUTIONS[0], "gelu"),
                (CONVOLUTIONS[0], "relu"),
                (CONVOLUTIONS[1], smooth),
            ]:
                options = {**options, "kernel": kernel, "activation": activation}
                table[f"{operator} of {h}x{w}, {kernel[0]}x{k}, {activation}"] = operator, options
            # Backward knows schedules of filters of 3 and 7 rows, of GELU and of no activation.
            for operator, activation in [
                (CONVOLUTIONS[0], "gelu"),
                (CONVOLUTIONS[0], "none"),
                (CONVOLUTIONS[1], "gelu"),
            ]:
                options = {**options, "kernel": (k, k), "activation": activation}
                table[f"{operator} of {h}x{w}, {k}x{k}, {activation}"] = operator, options
    for kernel in ((3, 3), (7, 5)):  # two outputs a channel: the derivative of the activation has a kernel of its own
        for shape in ((3, 2, 9, 16), (2, 2, 8, 11)):
            options = {"shape": shape, "kernel": kernel, "multiplier": 2, "activation": "silu"}
            table[f"two outputs a channel of {shape}, {kernel[0]}x{kernel[1]}"] = CONVOLUTIONS[0], options
    options = {"shape": (9, 2, 16, 16), "kernel": (7, 7), "multiprocessors": 1, "missing": ["residual"]}
    return {**table, "attention of 16x16 without a residual": ("ffnified_attention", options)}


#: Key and value of different sizes, whole and in segments: the rows of two convolutions are ahead of each other.
TWO_FILTERS: Table = {
    f"attention, {key} and {value}, {multiprocessors} multiprocessors": (
        "ffnified_attention",
        {"shape": (1, 2, 35, 18), "kernel": key, "value_kernel": value, "multiprocessors": multiprocessors},
    )
    for key, value in [((5, 3), (2, 4)), ((7, 7), (1, 1)), ((1, 1), (7, 9)), ((4, 2), (7, 3)), ((2, 9), (6, 8))]
    for multiprocessors in (2, 132)
}
ATTENTION: Table = {
    "attention without the optional": ("ffnified_attention", {
        "shape": (2, 3, 9, 16), "kernel": (3, 3), "missing": ["key_bias", "value_bias", "scale", "residual"],
    }),
    "attention, residual channels-last": ("ffnified_attention", {
        "shape": (2, 3, 9, 16), "kernel": (7, 7), "residual_layout": LAST,
    }),
    "attention, residual of odd rows": ("ffnified_attention", {
        "shape": (2, 2, 9, 16), "kernel": (3, 3), "residual_layout": "stepped",
    }),
    "attention, large value": ("ffnified_attention", {
        "shape": (2, 2, 12, 9), "kernel": (3, 3), "value_kernel": (9, 9),
    }),
}  # fmt: skip


def _banded() -> Table:
    table: Table = {}
    variants = [
        {}, {"stride": 2}, {"stride": (1, 2), "multiplier": 2}, {"multiplier": 2, "padding": 16},
        {"stride": (2, 1), "padding": "valid"}, {"stride": 2, "multiplier": 2, "padding": (4, 3)},
    ]  # fmt: skip
    shapes = [(5, 2, 16, 16), (3, 2, 12, 24), (2, 3, 9, 7), (2, 2, 10, 28), (1, 2, 9, 74), (20, 1, 8, 8)]
    for i, kernel in enumerate([(9, 9), (3, 3), (31, 31), (7, 7), (4, 13), (1, 31), (11, 5), (2, 2), (17, 24)]):
        for j, options in enumerate(variants):
            shape = shapes[(i + j) % len(shapes)]
            if options.get("padding") == "valid":
                shape = (2, 2, max(12, kernel[0]), max(14, kernel[1] + 1))
            elif options.get("padding") == (4, 3):
                shape = (2, 2, max(shape[2], kernel[0]), max(shape[3], kernel[1]))
            options = {
                "shape": shape,
                "kernel": kernel,
                "activation": ACTIVATIONS[(i + j) % len(ACTIVATIONS)],
                **options,
            }
            table[f"banded {kernel} on {shape} with {variants[j]}"] = "depthwise_conv2d", options
    return table


def _direct() -> Table:
    """What CUDA cores run of 16 bits: channels-last maps, an even number of channels in pairs, and older GPUs."""
    table: Table = {}
    for kernel in ((3, 3), (7, 7), (5, 4), (6, 18)):
        for stride in (1, 2):
            for shape, layout, architecture in [
                ((2, 18, 11, 9), LAST, 90), ((2, 7, 10, 12), LAST, 90), ((2, 3, 9, 19), "nchw", 75),
                ((3, 4, 9, 8), "channel_slice", 80),
            ]:  # fmt: skip
                options = {
                    "shape": shape, "kernel": kernel, "stride": stride, "layout": layout, "grad_layout": layout,
                    "architecture": architecture,
                }  # fmt: skip
                table[f"direct {kernel} on {shape}, stride {stride}, sm_{architecture}"] = "depthwise_conv2d", options
    for operator in ("ffnified_attention", "channel_mixer"):
        options = {"shape": (2, 6, 9, 16), "kernel": (3, 3), "architecture": 75}
        table[f"direct {operator}, sm_75"] = operator, options
    wide = {"shape": (1, 2, 4, 5), "kernel": (3, 71), "padding": (1, 66)}
    return {**table, "direct, wide padding": ("depthwise_conv2d", wide)}


def _mixers() -> Table:
    table: Table = {}
    for channels, outputs, hidden in [
        (48, 64, 96), (17, 9, 35), (80, 72, 40), (66, 80, 33), (96, 90, 64), (81, 96, 17), (128, 128, 48), (3, 101, 7),
        (136, 136, 40), (9, 131, 24),
    ]:  # fmt: skip
        for layout, shape in (
            ("nchw", (2, channels, 5, 8)),
            (LAST, (3, channels, 7, 9)),
            ("nchw", (1, channels, 3, 7)),
        ):
            options = {"shape": shape, "hidden": hidden, "outputs": outputs, "kernel": (3, 3), "layout": layout}
            table[f"mixer {channels} - {hidden} - {outputs} on {shape}"] = "channel_mixer", options
    options = {"shape": (2, 16, 8, 8), "hidden": 32, "kernel": (3, 3), "matrix_layout": "channels_innermost"}
    return {**table, "mixer, transposed weights": ("channel_mixer", options)}


#: 16 bits on tensor cores, mostly; the tables after them run in all dtypes.
PLANAR: Table = {**_planes(), **_machines(), **_known_rows(), **TWO_FILTERS, **ATTENTION, **_banded()}
OTHERS: Table = {
    **_direct(),
    **_mixers(),
    **{
        f"{op}: {name}": (op, dict(options))
        for op, cases in triton_cases.OPTIONS.items()
        for name, options in cases.items()
        if options.get("activation", "none") in ACTIVATIONS
    },
}
TABLE: Table = {**PLANAR, **OTHERS}
CASES = [(name, dtype) for name in PLANAR for dtype in HALVES] + [(name, dtype) for name in OTHERS for dtype in DTYPES]


def made(name: str, dtype: torch.dtype) -> tuple[Case, str, dict]:
    """A case of the tables, the layout of its result's gradient and the options of its `machine`."""
    operator, options = TABLE[name]
    settings = {key: options[key] for key in ("architecture", "multiprocessors", "resident_blocks") if key in options}
    options = {key: value for key, value in options.items() if key not in settings}
    if dtype != F32 and name == "channel_mixer: many pixels":
        # A ReLU's derivative jumps, and of many values some lie on the other side of zero by one rounding of 16 bits.
        options["activation"] = "silu"
    return *triton_cases.made(operator, {**options, "dtype": dtype}), settings


MACHINES = st.fixed_dictionaries(
    {"architecture": st.sampled_from([90, 90, 80, 75]), "multiprocessors": st.sampled_from([1, 2, 2, 132])}
)
SIZES = Sizes(
    images=st.one_of(st.integers(0, 3), st.sampled_from([17, 40])),
    channels=st.one_of(st.sampled_from([1, 2, 3, 8, 16, 17, 64]), st.integers(1, 40)),
    extents=st.one_of(st.sampled_from([1, 2, 7, 8, 14, 16, 24, 28, 33, 64, 72]), st.integers(1, 90)),
    kernels=st.one_of(st.sampled_from([(3, 3), (7, 7), (5, 5)]), st.tuples(st.integers(1, 31), st.integers(1, 31))),
    dtypes=st.sampled_from([F16, BF16, F32]),
    work=600_000,
    activations=st.sampled_from(ACTIVATIONS),
)
#: Filters that the fused attention takes, mostly.
PAIRS = SIZES._replace(
    kernels=st.one_of(st.sampled_from([(3, 3), (7, 7)]), st.tuples(st.integers(1, 8), st.integers(1, 10)))
)
