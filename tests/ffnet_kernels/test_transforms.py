"""Forward-mode derivatives and torch.func transforms, and what a forced backend says to them."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import ffnet_kernels as fk

X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
W = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(1))


def ours(x, w):
    return fk.depthwise_conv2d(x, w)


def plain(x, w):
    return F.conv2d(x, w, padding=1, groups=4)


TRANSFORMS = {
    "jvp": lambda f: torch.func.jvp(lambda x: f(x, W), (X,), (X,))[1],
    "jvp of the weight": lambda f: torch.func.jvp(lambda w: f(X, w), (W,), (W,))[1],
    "grad": lambda f: torch.func.grad(lambda w: f(X, w).square().sum())(W),
    "jacrev": lambda f: torch.func.jacrev(lambda w: f(X, w).sum((0, 2, 3)))(W),
    "hessian": lambda f: torch.func.hessian(lambda w: f(X, w).square().sum())(W),
    "vmap": lambda f: torch.func.vmap(lambda x: f(x, W))(X[None].expand(3, *X.shape)),
    "vmap of grad": lambda f: torch.func.vmap(lambda x: torch.func.grad(lambda w: f(x[None], w).square().sum())(W))(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(transform):
    torch.testing.assert_close(transform(ours), transform(plain))


def test_dual_numbers():
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(X, X), W)).tangent
    torch.testing.assert_close(tangent, plain(X, W))


@pytest.mark.skipif("cpu" not in fk.available_backends(), reason="no native CPU kernels")
def test_a_forced_backend_refuses():
    with fk.use_backend("cpu"), pytest.raises(fk.BackendError, match="forward-mode"):
        TRANSFORMS["jvp"](ours)
