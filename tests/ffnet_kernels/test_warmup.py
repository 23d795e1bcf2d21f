"""A warm-up runs the model and leaves no trace."""

import pytest
import torch
from torch import nn

import ffnet_kernels as fk
from ffnet_kernels.backends.triton import INTERPRETED
from ffnet_kernels.backends.triton.launch import recording


class Net(nn.Module):
    """Everything that keeps state: parameters with and without gradients, buffers, random numbers."""

    def __init__(self):
        super().__init__()
        self.conv = fk.DepthwiseConv2d(4, 3, activation="gelu")
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))
        self.runs = []

    def forward(self, x):
        self.seen = self.seen + 1
        self.runs.append(torch.is_grad_enabled())
        return self.drop(self.norm(self.conv(x))) * self.frozen


def state(model):
    random = torch.get_rng_state()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return random, {name: (t, t._version, t.detach().clone()) for name, t in tensors.items()}, grads, model.training


def assert_same(before, after):
    assert torch.equal(before[0], after[0])
    assert before[1].keys() == after[1].keys()
    for name, (tensor, version, value) in before[1].items():
        now = after[1][name]
        assert now[0] is tensor, name
        assert now[1] == version, name
        assert torch.equal(now[2], value), name
    for name, grad in before[2].items():
        assert (grad is None) == (after[2][name] is None), name
        assert grad is None or torch.equal(grad, after[2][name]), name
    assert before[3] == after[3]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_leaves_everything_as_it_was(training, gradients):
    model, x = Net().train(training), torch.randn(2, 4, 5, 6)
    if gradients:
        model(x).sum().backward()
        model.runs.clear()
    backwards = []
    model.conv.weight.register_hook(lambda grad: backwards.append(grad.shape))
    before = state(model)
    assert fk.warmup(model, x) is None
    assert_same(before, state(model))
    assert model.runs == [training]
    assert len(backwards) == training


def test_runs_after_a_warm_up_as_without_one():
    torch.manual_seed(0)
    model, x = Net().train(), torch.randn(2, 4, 5, 6)
    fk.warmup(model, x)
    torch.manual_seed(1)
    warm = model(x), model.norm.running_mean.clone()
    torch.manual_seed(0)
    model = Net().train()
    torch.manual_seed(1)
    cold = model(x), model.norm.running_mean.clone()
    assert all(map(torch.equal, warm, cold))


def test_takes_several_inputs_and_any_structure_of_outputs():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = fk.FFNifiedAttention(4, 3)

        def forward(self, query, residual):
            return {"out": [self.mixer(query, residual)], "size": query.shape, "none": None, "index": torch.arange(3)}

    model, x = Mixer().train(), torch.randn(1, 4, 5, 5, requires_grad=True)
    fk.warmup(model, (x, torch.randn(1, 4, 5, 5)))
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_a_model_in_training_mode_may_have_nothing_to_train():
    fk.warmup(nn.Identity().train(), torch.ones(1))
    with torch.no_grad():
        fk.warmup(Net().train(), torch.randn(2, 4, 5, 5))


def test_a_failing_model_is_left_as_it_was():
    model, wrong = Net().train(), torch.randn(2, 3, 5, 5)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"expected .* got"):
        fk.warmup(model, wrong)
    assert_same(before, state(model))


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"warmup: expected an nn.Module, got function"):
        fk.warmup(lambda x: x, torch.ones(1))


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_starts_the_kernels_that_training_needs():
    model, x = Net().train(), torch.randn(2, 4, 5, 6)
    with fk.use_backend("triton"), recording() as launches:
        fk.warmup(model, x)
    names = {found.kernel.__name__ for found in launches}
    assert any("forward" in name for name in names)
    assert any("backward" in name for name in names)
