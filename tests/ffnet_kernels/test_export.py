"""Programs of torch.export with our operators and without: what is in them, what they compute, what is refused."""

import math
import sys

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ffnet_kernels as fk
from ffnet_kernels.backends import choice, crossover

keeps = pytest.mark.parametrize("operators", [pytest.param(True, marks=parity.needs_native), False])


def randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def library_model() -> nn.Module:
    """Of PyTorch's classes alone."""
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.GELU(),
            nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.BatchNorm2d(16),
            nn.Conv2d(16, 32, 1), nn.GELU(), nn.Conv2d(32, 16, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )
    )  # fmt: skip


class OfAUser(nn.Module):
    """Whose classes only PyTorch's own capture takes, with results of several kinds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.GELU())
        self.depthwise, self.norm = nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.BatchNorm2d(16)
        self.expand, self.project = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)
        randomised(self)

    def forward(self, image, factor=2.0):
        x = self.stem(image)
        x = x + self.project(F.gelu(self.expand(self.norm(self.depthwise(x)))))
        pooled = x.mean((2, 3))
        return {"map": x * factor, "of": (self.head(pooled), pooled), "count": 3}


class OfModules(nn.Module):
    """Of the modules that ffnet_kernels has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = fk.DepthwiseConv2d(8, 7, activation="gelu")
        self.attention = fk.FFNifiedAttention(8, 5, layer_scale=0.5)
        self.mixer = fk.ChannelMixer(8, 3, layer_scale=0.5)
        self.eval()

    def forward(self, x):
        x = self.attention(self.conv(x), x)
        return self.mixer(x, x)


MODELS = {"library": (library_model, 3), "user": (OfAUser, 3), "modules": (OfModules, 8)}
models = pytest.mark.parametrize("name", MODELS)


def operators_of(program: torch.export.ExportedProgram) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {target.removesuffix(".default") for target in targets if target.startswith("ffnet_kernels")}


@models
@keeps
@pytest.mark.parametrize("optimised", [False, True])
def test_what_is_in_a_program_and_what_it_computes(name, operators, optimised):
    make, channels = MODELS[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if optimised:
        fk.optimize(model)
    program = fk.export(model, torch.randn(1, channels, 16, 12), operators=operators)
    assert bool(operators_of(program)) == operators
    if operators and name != "modules":
        assert operators_of(program) == {"ffnet_kernels.conv2d", "ffnet_kernels.channel_mixer"}
        assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]  # folded
    fk.restore(model)
    for batch in (1, 2, 5):
        x = torch.randn(batch, channels, 16, 12)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4, check_stride=False)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@keeps
def test_a_program_is_saved_and_loaded(operators, tmp_path):
    model, x = library_model(), torch.randn(2, 3, 16, 12)
    torch.export.save(fk.export(model, x, operators=operators), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@models
def test_a_fixed_batch_is_that_of_the_example(name):
    make, channels = MODELS[name]
    program = fk.export(make(), torch.randn(1, channels, 16, 12), operators=False, dynamic_batch=False)
    assert not program.range_constraints
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(torch.randn(2, channels, 16, 12))


@parity.needs_native
def test_linear_layers_go_by_the_rows_of_the_example():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.expand, self.back = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 64), nn.Linear(64, 32)
            self.eval()

        def forward(self, x):
            x = self.project(x).flatten(2).transpose(1, 2)
            return x + self.back(F.gelu(self.expand(x)))

    torch.manual_seed(3)
    model = Tokens()
    size = 4 * (math.isqrt(crossover.now.few_rows) + 1)  # of fewer rows PyTorch is faster
    program = fk.export(model, torch.randn(2, 3, size, size))
    assert "ffnet_kernels.conv2d" in operators_of(program)
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_that_changes_between_two_exports_is_exported_as_it_is():
    """And the same class as often as one likes: PyTorch keeps no more than a few captures of a function."""
    x = torch.randn(2, 3, 16, 12)
    for _ in range(10):
        model = OfAUser()
        nn.init.normal_(model.head.bias)
        program = fk.export(model, x)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4, check_stride=False)


@pytest.mark.parametrize(
    ("model", "example", "keywords", "error", "message"),
    [
        (lambda: "no model", torch.ones(1, 3, 8, 8), {}, TypeError, "export: expected an nn.Module, got str"),
        (library_model, [1.0], {}, TypeError, "export: expected a tensor as the example, got list"),
        (lambda: library_model().train(), torch.ones(1, 3, 8, 8), {}, ValueError, r"eval mode.*\.eval\(\)"),
        (lambda: nn.Sequential(nn.ReLU()).eval(), torch.ones(1, 3, 8, 8), {}, ValueError, "nothing in the model"),
        (lambda: library_model(), torch.ones(1, 4, 8, 8), {"operators": False}, RuntimeError, "channels"),
    ],
)
def test_bad_input(model, example, keywords, error, message):
    with pytest.raises(error, match=message):
        fk.export(model(), example, **keywords)


def test_a_child_in_training_mode_is_named():
    model = library_model()
    model[1].train()
    with pytest.raises(ValueError, match="1 is in training mode"):
        fk.export(model, torch.ones(1, 3, 8, 8))


def test_a_program_that_differs_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["ffnet_kernels.export"], "plainly", lambda model, x: model(x) + 1)
    with pytest.raises(RuntimeError, match="is not what the model is: results differ"):
        fk.export(library_model(), torch.randn(2, 3, 16, 12), operators=False)


def test_programs_have_only_operators_that_a_library_defines():
    for backend in choice.BACKENDS.values():
        if backend is not choice.BACKENDS["reference"]:
            assert set(backend.IN_LIBRARY) <= set(backend.OPERATORS)
    with choice.keep_operators(True):
        assert choice._state.keeps_operators
    assert not choice._state.keeps_operators


def test_programs_of_other_backends():
    """The CUDA library's operators, by its kernels for the processor; of Triton's, there are none in a library."""
    model, x = OfModules(), torch.randn(2, 8, 16, 12)
    backends = fk.available_backends()
    if "cuda" in backends:
        with fk.use_backend("cuda"):
            program = fk.export(model, x)
        expected = {f"ffnet_kernels_cuda.{name}" for name in ("depthwise_conv2d", "ffnified_attention")}
        assert operators_of(program) == expected
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4, check_stride=False)
    if "triton" in backends:
        with fk.use_backend("triton"), pytest.raises(ValueError, match="nothing in the model is for an operator"):
            fk.export(model, x)
    if not {"cuda", "triton"} & set(backends):
        pytest.skip("there are neither CUDA nor Triton kernels here")


@pytest.mark.long
@parity.needs_native
def test_aotinductor(tmp_path):
    model, x = OfAUser(), torch.randn(1, 3, 16, 12)
    path = torch._inductor.aoti_compile_and_package(fk.export(model, x), package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 12)
        out, expected = loaded(x), model(x)
        for key in ("map", "of"):
            torch.testing.assert_close(out[key], expected[key], rtol=1e-4, atol=1e-4, check_stride=False)
