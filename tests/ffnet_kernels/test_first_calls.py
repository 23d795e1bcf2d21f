"""The first call for a shape: of a large map, the modules run on a corner alone."""

import copy
import importlib

import parity
import pytest
import torch
from torch import nn

from ffnet_kernels import optimize, report
from ffnet_kernels.program import Program
from ffnet_kernels.trial import corner_of, strides_in_format_of

optimizing = importlib.import_module("ffnet_kernels.optimize")  # the function has its name
pytestmark = parity.needs_native


def layers(outputs=8):
    mixing = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.Conv2d(8, outputs, 1)
    return nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(), *mixing).eval()


@pytest.fixture
def sizes(monkeypatch):
    """Of the maps that modules run on as written."""
    seen, plainly = [], optimizing.plainly

    def watched(module, x):
        seen.append(tuple(x.shape))
        return plainly(module, x)

    monkeypatch.setattr(optimizing, "plainly", watched)
    return seen


def agree(model, x):
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        for _ in range(2):
            out = model(x)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            assert out.stride() == expected.stride()


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [1, 3])
def test_a_corner_tells(sizes, images, format, weights):
    model = optimize(layers().to(memory_format=weights))
    agree(model, torch.randn(images, 4, 260, 300).to(memory_format=format))
    assert sizes == [(min(images, 2), 4, 128, 128)]
    agree(model, torch.randn(images, 4, 140, 128).to(memory_format=format))  # of which the corner would be most
    assert sizes[1:] == [(images, 4, 140, 128)]


def test_results_whose_format_is_not_clear(sizes):
    agree(optimize(layers(outputs=1)), torch.randn(1, 4, 260, 300))
    assert sizes == [(1, 4, 128, 128), (1, 4, 260, 300)]


def test_maps_whose_format_is_not_clear(sizes):
    agree(optimize(layers()), torch.randn(1, 4, 300, 520)[..., ::2])
    assert sizes == [(1, 4, 300, 260)]


def test_layers_for_which_a_corner_is_too_small(sizes):
    agree(optimize(nn.Sequential(*layers(), nn.AvgPool2d(100))), torch.randn(1, 4, 260, 300))
    assert sizes == [(1, 4, 128, 128), (1, 4, 260, 300)]


class Large(nn.Module):
    """Of torchvision's code, as far as `optimize` can see, and with two minds."""

    __module__ = "torchvision.models.large"

    def __init__(self):
        super().__init__()
        self.layers = layers()

    def forward(self, x):
        y = self.layers(x)
        return y if x.shape[2] <= 128 else -y


def test_what_decides_by_the_size():
    model = Large()
    x = torch.randn(1, 4, 260, 300)
    agree(optimize(model), x)


def test_a_wrong_program(sizes, monkeypatch):
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self, x: 2 * run(self, x))
    model, x = optimize(layers()), torch.randn(1, 4, 260, 300)
    agree(model, x)
    assert sizes[:2] == [(1, 4, 128, 128), (1, 4, 260, 300)]  # then those of programs of layers
    assert "its program is not what the modules are" in str(report(model))


def test_a_program_that_fails_on_the_whole_map(sizes, monkeypatch):
    run = Program.run

    def fail(self, x):
        if x.shape[2] > 128:
            raise RuntimeError("too large")
        return run(self, x)

    monkeypatch.setattr(Program, "run", fail)
    model, x = optimize(layers()), torch.randn(1, 4, 260, 300)
    agree(model, x)
    assert sizes[:2] == [(1, 4, 128, 128), (1, 4, 260, 300)]  # then those of programs of layers
    assert "too large" in str(report(model))


@pytest.mark.parametrize(
    ("x", "size"),
    [
        (torch.empty(1, 3, 256, 256), (1, 3, 128, 128)),
        (torch.empty(8, 3, 128, 128), (2, 3, 128, 128)),
        (torch.empty(1, 3, 64, 2048), (1, 3, 64, 128)),
        (torch.empty(1, 3, 255, 256), None),  # it would not be a quarter
        (torch.empty(1, 1, 512, 512), None),  # in both formats
        (torch.empty(1, 3, 512, 1024)[..., ::2], None),  # in neither
    ],
)
def test_corners(x, size):
    corner = corner_of(x)
    assert size == (corner if corner is None else tuple(corner.shape))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_strides_in_a_format(format):
    like = torch.empty(1, 8, 4, 4, memory_format=format)
    result = torch.empty(2, 8, 6, 5, memory_format=format)
    assert strides_in_format_of(like, torch.empty(2, 8, 6, 5)) == result.stride()
    assert strides_in_format_of(torch.empty(2, 1, 4, 4), torch.empty(2, 1, 6, 5)) is None
    assert strides_in_format_of(torch.empty(2, 7), torch.empty(3, 7)) == (7, 1)
    assert strides_in_format_of(torch.empty(2, 8, 4, 4)[..., ::2], torch.empty(2, 8, 4, 4)) is None
