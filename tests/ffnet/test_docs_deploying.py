"""docs/deploying.md: every snippet of it runs, in order, on a small model."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from ffnet.examples import serve_image
from ffnet_kernels import native

SMALL = "depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)"
JSON = '{"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}'


def snippets(root, language):
    text = (root / "docs" / "deploying.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def smaller(text):
    text = text.replace('create_model("ffnet_1")', f'create_model("ffnet_1", {SMALL})')
    text = text.replace("--model ffnet_1", f"--model ffnet_1 --model-arguments '{JSON}'")
    return re.sub(r"\b224\b", "64", text)


def test_all_snippets_are_of_languages_that_run(root):
    languages = re.findall(r"^```(\w+)$", (root / "docs" / "deploying.md").read_text(), re.MULTILINE)
    assert set(languages) == {"python", "bash"}
    assert len(languages) == len(snippets(root, "python")) + len(snippets(root, "bash"))


needs_native = pytest.mark.skipif(bool(native.cpu_library_error()), reason="no native library was built")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.mark.long
@needs_native
@needs_compiler
def test_python(root, tmp_path):
    source = smaller("\n".join(snippets(root, "python")))
    run([sys.executable, "-c", source], root, tmp_path)
    assert (tmp_path / "compiled.pt2").exists()


@pytest.mark.long
@needs_native
@needs_compiler
def test_bash(root, tmp_path):
    pytest.importorskip("PIL")
    pytest.importorskip("sklearn")
    source = "\n".join(text for text in snippets(root, "bash") if "serve_image" not in text)
    python = f'python() {{ {sys.executable} "$@"; }}\n'
    out = run(["bash", "-ec", python + smaller(source)], root, tmp_path)
    assert "latency ms: median" in out
    assert {path.name for path in tmp_path.glob("*.pt2")} == {"program.pt2", "model.pt2", "plain.pt2"}


def test_the_table(root):
    """Its command is of the form that tests/ffnet/test_serve_image.py runs."""
    (source,) = (text for text in snippets(root, "bash") if "serve_image" in text)
    python, module, name, *options = source.split()
    assert (python, module, name) == ("python", "-m", "ffnet.examples.serve_image")
    assert serve_image.parser().parse_args(options).size == 224


def run(command, root, folder):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
