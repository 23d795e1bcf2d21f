"""`optimize` fuses an activation only where nothing in the model can tell."""

import pytest
import torch
from torch import nn

import ffnet_kernels


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1, groups=8)


class Named(nn.Module):
    """A convolution and an activation, each also under a second name."""

    def __init__(self, use: str):
        super().__init__()
        self.conv, self.act, self.use = conv(), nn.GELU(), use
        self.other_conv, self.other_act = self.conv, self.act

    def forward(self, x):
        c, a = {"conv": (self.other_conv, self.act), "act": (self.conv, self.other_act)}[self.use]
        return a(c(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = conv(), nn.GELU()

    def forward(self, x):
        return self.act(self.conv(x))


class Features(Block):
    def features(self, x):
        return self.conv(x)


class NoisyTraining(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.act(y * 2 if self.training else y)


class Reaching(nn.Module):
    """Calls a container and reaches into it as well."""

    def __init__(self, how: str):
        super().__init__()
        self.block, self.how = nn.Sequential(conv(), nn.GELU(), conv()), how

    def forward(self, x):
        if self.how == "iterates":
            kept = []
            for layer in self.block:
                x = layer(x)
                kept.append(x)
            return sum(kept)
        if self.how == "slices":
            return self.block[:1](x) + self.block(x)
        return self.block(x) + self.block[0](x)


class Recording(Block):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


MODELS = {
    "conv under two names": lambda: Named("conv"),
    "activation under two names": lambda: Named("act"),
    "another method": Features,
    "another path in training": NoisyTraining,
    "a parent iterates": lambda: Reaching("iterates"),
    "a parent slices": lambda: Reaching("slices"),
    "a parent indexes": lambda: Reaching("indexes"),
    "a parent of the parent": lambda: nn.Sequential(Reaching("indexes"), nn.ReLU()),
    "beside a 3-D convolution": lambda: nn.ModuleDict({"a": Block(), "b": nn.Conv3d(1, 1, 1)}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_results_agree_in_both_modes_and_methods(make, training):
    model = make().double()
    optimized = ffnet_kernels.optimize(model.train(training))
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    calls = [lambda m: m(x)] if not isinstance(model, nn.ModuleDict) else [lambda m: m["a"](x)]
    if hasattr(model, "features"):
        calls.append(lambda m: m.features(x))
    for call in calls:
        for mode in (False, True):
            torch.testing.assert_close(call(optimized.train(mode)), call(model.train(mode)))


def test_a_plain_block_is_fused():
    """Else the tests above would pass with nothing fused at all."""
    optimized = ffnet_kernels.optimize(nn.Sequential(Block(), nn.Sequential(conv(), nn.GELU())))
    assert {r.operator for r in optimized.kernel_replacements} == {"depthwise_conv2d + gelu"}


def test_tracing_leaves_nothing_behind(tmp_path):
    optimized = ffnet_kernels.optimize(Recording().eval())
    assert "last" not in vars(optimized)
    torch.save(optimized, tmp_path / "model.pt")


def test_a_shared_layer_stays_one_layer():
    model = Named("conv")
    optimized = ffnet_kernels.optimize(model)
    assert optimized.conv is optimized.other_conv


def test_a_nested_ffnet_prepares_itself():
    import ffnet

    model = nn.Sequential(ffnet.FFNet((1, 1, 1, 1), (8, 16, 32, 64), (3, 3, 7, 7), 3, num_classes=4)).eval()
    operators = {r.operator for r in ffnet_kernels.optimize(model).kernel_replacements}
    assert {"ffnified_attention", "channel_mixer"} <= operators
