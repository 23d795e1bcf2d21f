"""The self-test: what it runs, what it finds, and what its command answers."""

import sys

import cuda_cases
import parity
import pytest
import torch

import ffnet_kernels as fk
from ffnet_kernels import native
from ffnet_kernels.__main__ import main
from ffnet_kernels.backends import choice, triton
from ffnet_kernels.ops._operator import Operator

module = sys.modules["ffnet_kernels.selftest"]  # the package's attribute of that name is the function


@pytest.fixture
def only_cpu(monkeypatch):
    monkeypatch.setattr(choice, "available_backends", lambda: ("cpu", "reference"))


def test_cases_are_the_same_in_every_run():
    first, second = list(module.cases()), list(module.cases())
    assert len({case.name for case in first}) == len(first)
    assert [case.name for case in first] == [case.name for case in second]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.args, other.args, strict=True) if isinstance(a, torch.Tensor))


def test_maps_are_in_the_layout_that_a_case_says():
    for case in module.cases():
        for layout in case.layouts:
            args = case.laid_out(layout)
            maps = [args[i] for i in (0, case.spec.residual) if i is not None]
            assert all(m.is_contiguous(memory_format=module.LAYOUTS[layout]) for m in maps), case.name
            assert all(torch.equal(m, n) for m, n in zip(maps, [case.args[0], case.args[-1]], strict=False))


@parity.needs_native
def test_every_result_of_every_operator_is_checked(only_cpu):
    names = {check.case for check in fk.selftest(text="k=3 ")}
    for definition in map(parity.OPERATORS_BY_NAME.get, parity.OPERATORS):
        wanted = {definition.names[i] for i in definition.tensors if i != definition.residual}
        found = {name.split()[2] for name in names if f" of {definition.name} " in name}
        assert found == wanted
        assert any(name.startswith(f"{definition.name} ") for name in names)


@parity.needs_native
@pytest.mark.parametrize("which", [0, 1, 2])
def test_it_finds_a_wrong_gradient(only_cpu, monkeypatch, which):
    correct = Operator.backward_on

    def wrong(self, backend, *call):
        grads = list(correct(self, backend, *call))
        if (self.name, backend) != ("depthwise_conv2d", "cpu"):
            return grads
        grads[which] = grads[which].clone(memory_format=torch.contiguous_format)
        grads[which].view(-1)[-1] += (1e-3 if grads[which].dtype == torch.float32 else 0.2) * grads[which].abs().max()
        return grads

    monkeypatch.setattr(Operator, "backward_on", wrong)
    checks = fk.selftest(text="k=5 ")
    name = f"gradient of {('x', 'weight', 'bias')[which]} of depthwise_conv2d "
    assert [c.case for c in checks if not c.passed] == [c.case for c in checks if c.case.startswith(name)] != []


@parity.needs_native
def test_it_finds_memory_that_is_not_written(only_cpu, monkeypatch):
    correct = Operator.on

    def unwritten(self, backend, *args):
        return self.defined.empty(*args) if backend == "cpu" else correct(self, backend, *args)

    monkeypatch.setattr(Operator, "on", unwritten)
    checks = [c for c in fk.selftest(text="depthwise_conv2d k=3 s=1") if not c.case.startswith("gradient")]
    assert checks
    assert not any(check.passed for check in checks)


def test_kernels_for_tests_run_only_when_they_are_named(monkeypatch):
    ran = []
    monkeypatch.setattr(module, "_checks", lambda backend, text: iter(ran.append((backend, text)) or ()))
    monkeypatch.setattr(choice, "available_backends", lambda: ("cuda", "triton", "cpu", "reference"))
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None)
    monkeypatch.setattr(triton, "INTERPRETED", True)
    monkeypatch.setattr(native, "cuda_host_library", lambda: "library.so")
    fk.selftest()
    assert ran == [("cpu", "")]
    fk.selftest(backend="cuda", text="k=3")
    fk.selftest(backend="triton")
    assert ran[1:] == [("cuda", "k=3"), ("triton", "")]
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(native, "cuda_host_library", lambda: None)
    fk.selftest()
    assert [backend for backend, _ in ran[3:]] == ["cuda", "triton", "cpu"]


@pytest.mark.parametrize("name", ["reference", "auto", "opencl"])
def test_backends_without_kernels(name, capsys):
    with pytest.raises(ValueError, match="selftest: expected one of cuda, triton, cpu, got"):
        fk.selftest(backend=name)
    with pytest.raises(SystemExit) as exit_:
        main(["selftest", "--backend", name])
    assert exit_.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_backend_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(choice, "why_unavailable", lambda name: "there is no GPU")
    assert main(["selftest", "--backend", "cuda"]) == 2
    assert capsys.readouterr().err == "selftest: backend 'cuda' is not available: there is no GPU\n"


@parity.needs_native
def test_the_command_for_one_backend_and_some_cases(capsys):
    assert main(["selftest", "--backend", "cpu", "--filter", "attention k=4 ", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("cpu/" in line and "ffnified_attention k=4 " in line for line in lines[:-2])
    assert lines[-1] == f"{len(lines) - 2} passed, 0 failed"
    assert len(lines) > 2


@cuda_cases.needs_host
def test_it_starts_every_cuda_kernel():
    cuda_cases.started_kernels()
    checks = fk.selftest(backend="cuda")
    assert [check.case for check in checks if not check.passed] == []
    started, built = cuda_cases.started_kernels(), set(cuda_cases.kernels_by_address().values())
    assert {name.split("<")[0] for name in started} == {name.split("<")[0] for name in built}
    assert {check.case.split()[-1] for check in checks} == {"float32", "bfloat16", "float16"}
