"""Cases of the Triton kernels, each of several features at once, for their interpreter.

It takes some 20 µs an operation on a whole tile: programs, rows of a filter and its columns cost, while pixels and
channels within a tile do not.
"""

import pytest
import torch
from examples import example
from hypothesis import strategies as st
from parity import OPERATORS_BY_NAME, Case, Sizes, laid_out

from ffnet_kernels.backends import triton
from ffnet_kernels.backends.activations import ACTIVATIONS
from ffnet_kernels.backends.triton.launch import INTERPRETED

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED or bool(triton.unavailable()),
    reason=f"no interpreted Triton kernels: {triton.unavailable() or 'TRITON_INTERPRET is not 1'}",
)

BF16, F16 = torch.bfloat16, torch.float16
LAST = "channels_last"
INNERMOST = "channels_innermost"

DEPTHWISE = {
    "1x1": {"shape": (2, 17, 5, 7), "kernel": (1, 1), "layout": LAST, "activation": "relu"},
    "1x1 with stride 2": {"shape": (1, 3, 5, 6), "kernel": (1, 1), "stride": 2, "activation": "none"},
    "2x2": {"shape": (1, 3, 6, 5), "kernel": (2, 2), "dtype": BF16, "grad_layout": LAST},
    "3x3": {"shape": (2, 17, 5, 6), "kernel": (3, 3), "activation": "gelu", "grad_layout": LAST},
    "3x3 of aligned channels": {"shape": (1, 88, 4, 3), "kernel": (3, 3), "dtype": BF16, "layout": LAST},
    "3x3 of aligned rows": {"shape": (1, 8, 3, 8), "kernel": (3, 3), "dtype": F16, "weight_layout": INNERMOST},
    "3x3 over other channels": {"shape": (1, 17, 4, 5), "kernel": (3, 3), "layout": "channel_slice"},
    "3x3 on a wide and high map": {"shape": (1, 1, 26, 67), "kernel": (3, 3), "activation": "silu"},
    "4x4": {"shape": (1, 17, 4, 6), "kernel": (4, 4), "dtype": F16, "layout": "stepped", "activation": "silu"},
    "5x5": {"shape": (1, 1, 5, 4), "kernel": (5, 5), "layout": "window", "activation": "gelu_tanh"},
    "5x5 of an expanded map": {"shape": (2, 3, 4, 4), "kernel": (5, 5), "layout": "expanded_batch"},
    "6x2": {"shape": (1, 3, 4, 5), "kernel": (6, 2), "activation": "relu"},
    "7x7": {"shape": (1, 17, 9, 18), "kernel": (7, 7), "layout": LAST, "missing": ["bias"], "activation": "none"},
    "7x7 on a small map": {"shape": (1, 88, 3, 2), "kernel": (7, 7), "dtype": F16, "activation": "gelu"},
    "7x7 valid": {"shape": (1, 3, 9, 8), "kernel": (7, 7), "padding": "valid", "weight_layout": INNERMOST},
    "8x3": {"shape": (1, 3, 4, 4), "kernel": (8, 3), "layout": LAST, "weight_layout": "stepped"},
    "9x9": {"shape": (1, 3, 4, 7), "kernel": (9, 9), "activation": "none"},
    "9x2 with stride 2": {"shape": (1, 3, 6, 5), "kernel": (9, 2), "stride": 2, "padding": 4, "activation": "silu"},
    "16x1": {"shape": (1, 3, 4, 5), "kernel": (16, 1), "dtype": BF16, "layout": LAST},
    "17x1 with stride 2": {"shape": (1, 3, 7, 5), "kernel": (17, 1), "stride": 2, "activation": "none"},
    "24x1, two outputs": {"shape": (1, 3, 4, 5), "kernel": (24, 1), "multiplier": 2, "activation": "none"},
    "3x31": {"shape": (1, 17, 3, 6), "kernel": (3, 31), "missing": ["bias"]},
    "31x31": {"shape": (1, 3, 2, 3), "kernel": (31, 31)},
    "padding wider than the filter": {"shape": (1, 3, 3, 4), "kernel": (3, 2), "padding": (4, 3), "activation": "relu"},
    "stride 2": {"shape": (1, 17, 7, 9), "kernel": (3, 3), "stride": 2, "activation": "gelu"},
    "stride (2, 1) on a wide map": {
        "shape": (1, 8, 18, 72), "kernel": (3, 3), "stride": (2, 1), "weight_layout": INNERMOST, "activation": "none",
    },
    "stride 2, two outputs": {
        "shape": (2, 16, 6, 8), "kernel": (3, 3), "stride": 2, "padding": 1, "multiplier": 2, "dtype": BF16,
        "layout": LAST, "activation": "relu",
    },
    "stride (2, 1), two outputs": {
        "shape": (1, 3, 8, 6), "kernel": (5, 3), "stride": (2, 1), "multiplier": 2, "padding": "valid", "dtype": F16,
    },
    "stride (1, 2)": {"shape": (1, 3, 4, 7), "kernel": (2, 4), "stride": (1, 2), "layout": "stepped"},
    "two outputs": {"shape": (1, 17, 4, 5), "kernel": (4, 3), "multiplier": 2, "activation": "gelu_tanh"},
    "batch 0": {"shape": (0, 3, 4, 5), "kernel": (3, 3), "activation": "gelu"},
}  # fmt: skip

ATTENTION = {
    "31x31": {"shape": (1, 2, 4, 5), "kernel": (31, 31)},
    "3x3": {"shape": (2, 17, 5, 7), "kernel": (3, 3), "grad_layout": LAST},
    "3x3 of aligned channels": {"shape": (1, 88, 4, 6), "kernel": (3, 3), "dtype": BF16, "layout": LAST},
    "3x3 of aligned rows": {"shape": (1, 8, 3, 8), "kernel": (3, 3), "weight_layout": INNERMOST},
    "3x3 on a wide and high map": {"shape": (1, 1, 26, 67), "kernel": (3, 3), "dtype": F16},
    "3x3 on a wide map, channels last": {"shape": (1, 3, 8, 67), "kernel": (3, 3), "layout": LAST},
    "3x3 without the optional": {
        "shape": (1, 3, 4, 5), "kernel": (3, 3), "missing": ["key_bias", "value_bias", "scale", "residual"],
        "activation": "silu", "layout": "expanded_channels",
    },
    "5x5": {"shape": (1, 3, 9, 4), "kernel": (5, 5), "activation": "relu", "layout": LAST, "missing": ["scale"]},
    "7x7, 4 high": {"shape": (1, 88, 4, 5), "kernel": (7, 7), "layout": LAST, "activation": "gelu_tanh"},
    "7x7, 8 high": {"shape": (1, 17, 8, 8), "kernel": (7, 7), "dtype": BF16, "weight_layout": INNERMOST},
    "7x7, 16 high": {"shape": (1, 3, 16, 7), "kernel": (7, 7)},
    "7x7, 24 high": {"shape": (1, 3, 24, 5), "kernel": (7, 7), "layout": LAST, "dtype": F16},
    "7x7 on a high map": {"shape": (1, 3, 26, 5), "kernel": (7, 7), "layout": LAST},
    "7x7 on a wide map": {"shape": (1, 2, 3, 67), "kernel": (7, 7), "activation": "none"},
    "7x7 on a wide map, channels last": {"shape": (1, 3, 3, 35), "kernel": (7, 7), "layout": LAST},
    "7x7 on a small map": {"shape": (2, 1, 2, 3), "kernel": (7, 7), "layout": "expanded_batch"},
    "3x7": {"shape": (1, 3, 4, 70), "kernel": (3, 7), "missing": ["key_bias", "residual"]},
    "7x1": {"shape": (1, 3, 5, 4), "kernel": (7, 1), "layout": "stepped", "residual_layout": LAST},
    "5x4": {"shape": (1, 3, 6, 9), "kernel": (5, 4), "layout": "channel_slice", "missing": ["value_bias"]},
    "5x2": {"shape": (1, 3, 4, 67), "kernel": (5, 2), "layout": "window", "dtype": BF16},
    "1x1": {"shape": (1, 17, 5, 4), "kernel": (1, 1), "dtype": F16},
    "2x2": {"shape": (1, 3, 4, 5), "kernel": (2, 2), "layout": LAST, "missing": ["scale"]},
    "4x4": {"shape": (1, 3, 3, 4), "kernel": (4, 4), "missing": ["residual", "value_bias"]},
    "3x9": {"shape": (1, 3, 3, 11), "kernel": (3, 9), "missing": ["key_bias"]},
    "9x9": {"shape": (1, 3, 3, 4), "kernel": (9, 9), "activation": "gelu"},
    "3x3 and 5x5": {"shape": (1, 17, 4, 5), "kernel": (3, 3), "value_kernel": (5, 5), "dtype": BF16},
    "5x3 and 2x4": {"shape": (1, 3, 5, 4), "kernel": (5, 3), "value_kernel": (2, 4), "activation": "relu"},
    "batch 0": {"shape": (0, 3, 4, 5), "kernel": (3, 3)},
    "batch 0, two filters": {"shape": (0, 3, 4, 5), "kernel": (3, 3), "value_kernel": (2, 2)},
}  # fmt: skip

MIXER = {
    "31x31": {"shape": (1, 3, 2, 3), "kernel": (31, 31), "hidden": 7, "outputs": 3},
    "3x3": {"shape": (2, 17, 4, 5), "kernel": (3, 3), "hidden": 35, "outputs": 9, "grad_layout": LAST},
    "3x3 of aligned channels": {"shape": (1, 88, 4, 6), "kernel": (3, 3), "hidden": 40, "dtype": BF16, "layout": LAST},
    "1x1 of aligned rows": {
        "shape": (1, 8, 3, 8), "kernel": (1, 1), "hidden": 24, "activation": "gelu_tanh", "matrix_layout": INNERMOST,
    },
    "3x3 without the optional": {
        "shape": (1, 17, 4, 5), "kernel": (3, 3), "activation": "silu",
        "missing": ["bias", "expand_bias", "project_bias", "scale", "residual"],
    },
    "many pixels": {"shape": (1, 3, 16, 40), "kernel": (1, 3), "hidden": 70, "activation": "relu"},
    "one channel": {
        "shape": (1, 1, 3, 4), "kernel": (2, 2), "hidden": 1, "outputs": 1, "dtype": F16, "activation": "none",
    },
    "fused in bfloat16": {
        "shape": (2, 17, 4, 9), "kernel": (3, 3), "hidden": 33, "outputs": 5, "dtype": BF16, "activation": "relu",
    },
    "fused in float16": {
        "shape": (1, 3, 5, 27), "kernel": (5, 2), "hidden": 7, "dtype": F16, "layout": "window", "activation": "silu",
    },
    "fused of aligned rows": {
        "shape": (1, 16, 2, 8), "kernel": (1, 1), "hidden": 8, "dtype": BF16, "matrix_layout": INNERMOST,
    },
    "fused without the optional": {
        "shape": (1, 40, 4, 4), "kernel": (3, 3), "dtype": F16, "layout": LAST, "activation": "gelu_tanh",
        "missing": ["bias", "expand_bias", "project_bias", "scale", "residual"],
    },
    "wide in bfloat16": {"shape": (1, 136, 4, 3), "kernel": (3, 3), "hidden": 24, "dtype": BF16, "layout": LAST},
    "wide in float16": {"shape": (1, 3, 4, 5), "kernel": (3, 2), "hidden": 5, "outputs": 131, "dtype": F16},
    "wide in float32": {"shape": (1, 136, 3, 4), "kernel": (3, 3), "hidden": 65, "outputs": 72, "layout": LAST},
    "7x7": {"shape": (1, 17, 3, 2), "kernel": (7, 7), "layout": "stepped", "weight_layout": INNERMOST},
    "9x1": {"shape": (2, 3, 4, 4), "kernel": (9, 1), "layout": "expanded_batch", "activation": "none"},
    "1x1": {"shape": (1, 17, 3, 5), "kernel": (1, 1), "layout": "channel_slice", "missing": ["residual"]},
    "residual of another layout": {
        "shape": (2, 3, 4, 5), "kernel": (3, 3), "residual_layout": LAST, "missing": ["scale", "project_bias"],
        "layout": "transposed",
    },
    "batch 0": {"shape": (0, 3, 4, 5), "kernel": (3, 3)},
    "batch 0, fused": {"shape": (0, 3, 4, 5), "kernel": (3, 3), "dtype": BF16},
}  # fmt: skip

for _name in ACTIVATIONS:
    _tiny = {"shape": (1, 3, 4, 5), "kernel": (3, 3), "activation": _name}
    DEPTHWISE[_name] = ATTENTION[_name] = MIXER[_name] = _tiny
    MIXER[f"{_name}, fused"] = {**_tiny, "dtype": BF16}

OPTIONS = {"depthwise_conv2d": DEPTHWISE, "ffnified_attention": ATTENTION, "channel_mixer": MIXER}

SIZES = Sizes(
    images=st.integers(0, 2),
    channels=st.one_of(st.sampled_from([1, 3, 8, 16, 17]), st.integers(1, 40)),
    extents=st.one_of(st.sampled_from([1, 2, 4]), st.integers(1, 9)),
    kernels=st.one_of(st.sampled_from([(3, 3), (5, 5)]), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    dtypes=st.sampled_from([torch.float32, BF16, F16]),
    work=100_000,
)
#: Two filters that are often of one size: those are fused.
PAIRS = SIZES._replace(kernels=st.sampled_from([(3, 3), (5, 3), (3, 3), (2, 4)]))


_KINDS = {"key": "weight", "value": "weight", "expand_weight": "matrix", "project_weight": "matrix"}


def made(operator: str, options: dict) -> tuple[Case, str]:
    """A case of the tables above, and the layout of its result's gradient."""
    options = dict(options)
    missing = options.pop("missing", ())
    layouts = {name: options.pop(f"{name}_layout", "nchw") for name in ("weight", "matrix", "residual", "grad")}
    case = example(operator, **options)
    names = [argument.split()[-1] for argument in OPERATORS_BY_NAME[operator].arguments.split(", ")]

    def altered(name: str, value):
        if name in missing:
            return None
        layout = layouts.get(_KINDS.get(name, name), "nchw")
        if layout == "nchw":
            return value
        extents = (*value.shape, 1, 1)[:4]
        return laid_out(extents, layout, torch.Generator(), dtype=value.dtype).view_as(value).copy_(value)

    assert set(missing) <= set(names)
    args = tuple(map(altered, names, case.args))
    return Case(operator, args, {k: altered(k, v) for k, v in case.kwargs.items()}), layouts["grad"]
