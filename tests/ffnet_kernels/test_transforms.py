"""Forward-mode derivatives, torch.func transforms and vectorised Jacobians, and what a forced backend says to them."""

import operator_calls
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

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


CALLS = operator_calls.calls()
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every_call
def test_vectorised_jacobian(call):
    """The forward pass is a kernel's; gradients of all of its results are computed at once."""
    found, expected = (jacobian(f, tuple(call.tensors), vectorize=True) for f in (call.ours, call.plain))
    assert_close(found, expected)


@every_call
def test_vectorised_hessian(call):
    x, *rest = call.tensors
    found, expected = (
        hessian(lambda x, f=f: f(x, *rest).square().mean(), x, vectorize=True) for f in (call.ours, call.plain)
    )
    assert_close(found, expected)


@every_call
def test_jacrev(call):
    x, *rest = call.tensors
    found, expected = (torch.func.jacrev(lambda x, f=f: f(x, *rest))(x) for f in (call.ours, call.plain))
    assert_close(found, expected)


@every_call
@pytest.mark.parametrize("create_graph", [False, True])
def test_vmap_of_a_backward_pass(call, create_graph):
    leaves = [t.detach().requires_grad_() for t in call.tensors]

    def gradients(function):
        out = function(*leaves)
        several = operator_calls.random(3, *out.shape, seed=9)
        return torch.func.vmap(lambda g: torch.autograd.grad(out, leaves, g, True, create_graph))(several)

    found, expected = gradients(call.ours), gradients(call.plain)
    assert_close(found, expected)
    assert found[0].requires_grad == create_graph


@every_call
def test_second_derivatives_do_not_depend_on_autocast_around_the_backward_pass(call):
    found = []
    for enabled in (False, True):
        leaves = [t.detach().requires_grad_() for t in call.tensors]
        out = call.ours(*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*found)
