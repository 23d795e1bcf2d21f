"""Memory asked for ahead: nothing is read, so nothing depends on it."""

import gc
from array import array

import pytest
import torch
from torch import nn

from ffnet_kernels import native, optimize
from ffnet_kernels.prefetch import Prefetch

needs_helper = pytest.mark.skipif(native.helper() is None, reason="pybind11 was not installed when this was built")


@needs_helper
def test_addresses_may_hold_nothing():
    native.helper().fetch(array("Q", [0, 1, 2**47, 2**64 - 1]), 4)


def test_objects_may_have_gone():
    tensors = [torch.randn(4) for _ in range(3)]
    objects = [{1: 2}, object()]
    prefetch = Prefetch(objects, tensors, [tensor.untyped_storage()._cdata for tensor in tensors])
    prefetch()
    del tensors, objects
    gc.collect()
    prefetch()


@needs_helper
def test_only_arrays_of_addresses():
    with pytest.raises(TypeError):
        native.helper().fetch([1, 2], 1)
    with pytest.raises(ValueError, match="addresses"):
        native.helper().fetch(array("I", [1, 2]), 1)


def test_programs_need_no_helper(monkeypatch):
    monkeypatch.setattr(native, "helper", lambda: None)
    model = optimize(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)).eval())
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        before = [model(x) for _ in range(3)][-1]
        model[0].weight.mul_(2)
        torch.testing.assert_close(model(x), 2 * before)
