"""What a build is made for: the instruction sets of this processor, or those that were asked for."""

import re
import sys

import native_build
import parity
import pytest

KNOWN = list(native_build.load_builder(native_build.ROOT / "csrc").ISA_FLAGS)


@pytest.fixture
def builder(monkeypatch):
    monkeypatch.delenv("FFNET_CPU_ISAS", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return native_build.load_builder(native_build.ROOT / "csrc")


@parity.needs_native
def test_unless_asked_for_others_they_are_the_processors(builder, monkeypatch):
    monkeypatch.delenv("FFNET_KERNELS_ISA", raising=False)
    wanted = builder.isas(native_build.compiler())
    assert wanted == [isa for isa in KNOWN if isa in wanted]
    assert set(parity.ISAS) <= set(wanted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", KNOWN),
        ("ALL ", KNOWN),
        ("avx2", ["baseline", "avx2"]),
        ("avx512bf16, AVX2", ["baseline", "avx2", "avx512bf16"]),
        ("baseline", ["baseline"]),
    ],
)
def test_those_that_are_asked_for(builder, monkeypatch, text, expected):
    monkeypatch.setenv("FFNET_CPU_ISAS", text)
    assert builder.isas([]) == expected


@pytest.mark.parametrize("text", ["sse", "avx2,all", "avx2;neon"])
def test_others_are_told(builder, monkeypatch, text):
    monkeypatch.setenv("FFNET_CPU_ISAS", text)
    with pytest.raises(ValueError, match=f"FFNET_CPU_ISAS='{text}' is neither 'all' nor a list of baseline, avx2, "):
        builder.isas([])


@pytest.mark.parametrize("compiler", [["/bin/false"], [sys.executable, "-c", ""]])
def test_all_where_no_program_can_ask(builder, compiler):
    assert builder.isas(compiler) == KNOWN


def test_the_library_knows_the_same_ones():
    header = (native_build.ROOT / "csrc" / "cpu" / "processor.h").read_text()
    (names,) = re.findall(r"kInstructionSets\[\] = \{(.*)\};", header)
    assert re.findall(r"\w+", names) == KNOWN


def test_elsewhere_there_is_one(builder, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert builder.isas(native_build.compiler()) == ["baseline"]
