"""Every tile that may be chosen, interpreted: also those that only a measurement on a GPU would pick."""

import itertools

import parity
import pytest
import torch
import triton_cases
from examples import example

from ffnet_kernels.backends.triton import configs

pytestmark = [pytest.mark.long, triton_cases.needs_interpreter]

CONVOLUTION = {"kernel": (3, 3), "activation": "none"}
MATRICES = {"shape": (1, 17, 4, 33), "kernel": (1, 1), "hidden": 70}
#: Calls that run a kernel: the operator, its options and whether it is in the backward pass.
CALLS = {
    "depthwise": ("depthwise_conv2d", CONVOLUTION, False),
    "depthwise_weight": ("depthwise_conv2d", {**CONVOLUTION, "multiplier": 2}, True),
    "depthwise_sum": ("depthwise_conv2d", {**CONVOLUTION, "multiplier": 2}, True),
    "depthwise_backward": ("depthwise_conv2d", CONVOLUTION, True),
    "attention": ("ffnified_attention", {"kernel": (3, 3)}, False),
    "attention_backward": ("ffnified_attention", {"kernel": (3, 3)}, True),
    "channel_mixer": ("channel_mixer", MATRICES, False),
    "channel_mixer_backward": ("channel_mixer", MATRICES, True),
    "pointwise": ("channel_mixer", {**MATRICES, "outputs": 135}, False),
    "pointwise_weight": ("channel_mixer", MATRICES, True),
}


def row_tiles():
    """Every tile that the rule gives for some map: (kernel, whether the map is channels-last, tile)."""
    found = {}
    for kernel, last in itertools.product(configs._CANDIDATES, (False, True)):
        for height, width, taps in itertools.product((4, 8, 16, 24, 32), (8, 16, 32, 64, 100), (1, 3, 7, 31)):
            shape = configs.Shape(kernel, torch.float32, last, 1, 64, height, width, taps)
            found.update(dict.fromkeys((kernel, last, tile) for tile in configs.candidates(shape)))
    return [pytest.param(*key, id=f"{key[0]}-{'last' if key[1] else 'nchw'}-{_numbers(key[2])}") for key in found]


def matrix_tiles():
    """Likewise (kernel, dtype, tile)."""
    found = {}
    kernels = [kernel for kernel in CALLS if kernel not in configs._CANDIDATES]
    for kernel, dtype in itertools.product(kernels, (torch.float32, torch.bfloat16, torch.float16)):
        if kernel == "channel_mixer" and dtype == torch.float32:
            continue  # never fused
        for pixels, channels in itertools.product((16, 1 << 16), (16, 64, 256)):
            shape = configs.MatrixShape(kernel, dtype, False, pixels, channels, channels)
            found.update(dict.fromkeys((kernel, dtype, tile) for tile in configs.matrix_candidates(shape)))
    return [pytest.param(*key, id=f"{key[0]}-{str(key[1])[6:]}-{_numbers(key[2])}") for key in found]


def _numbers(tile):
    return "x".join(map(str, tile))


def run(name, choose, **options):
    operator, given, backward = CALLS[name]
    check = parity.check_gradients if backward else parity.check
    with configs.choosing(choose):
        check(example(operator, **{**given, **options}), "triton")


def run_with(tile, name, **options):
    """Parity where one kernel has this tile; that it was asked for."""
    asked = set()

    def choose(shape, tiles):
        asked.add(shape.kernel)
        return tile if shape.kernel == name else tiles[0]

    run(name, choose, **options)
    assert name in asked


@pytest.mark.parametrize(("kernel", "last", "tile"), row_tiles())
def test_row_tile(kernel, last, tile):
    """On a map of a row and a column more than the tile where it is small, fewer where it is large."""
    size = (min(tile.rows, 8) + 1, tile.block_w + 1 if tile.block_w <= 16 else 9)
    filters = {"kernel": (7, 3)} if tile.rows > 8 else {}
    layout = "channels_last" if last else "nchw"
    run_with(tile, kernel, shape=(1, 3, *size), layout=layout, **filters)


@pytest.mark.parametrize(("kernel", "dtype", "tile"), matrix_tiles())
def test_matrix_tile(kernel, dtype, tile):
    run_with(tile, kernel, dtype=dtype)


def test_every_kernel_is_asked_for():
    """No kernel escapes the tests above."""
    asked = set()

    def choose(shape, tiles):
        asked.add(shape.kernel)
        return tiles[0]

    for kernel in CALLS:
        for dtype in (torch.float32, torch.bfloat16):
            run(kernel, choose, shape=(1, 3, 4, 4), dtype=dtype)
    assert asked == set(CALLS)
