"""What contributors rely on: one version of each tool, and automation that runs what the project calls CI."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ffnet_kernels

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"\b([A-Za-z][\w-]*)==([\w.]+)")


def pins(name: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / name).read_text()))


REQUIREMENTS = pins("requirements.txt") | pins("requirements-dev.txt")


def disagreements(text: str, known: dict[str, str]) -> list[str]:
    """Pins of a text that the requirements do not have or have in another version."""
    return [f"{name}=={version}" for name, version in PIN.findall(text) if known.get(name) != version]


def test_pre_commit_runs_the_versions_that_the_tests_run():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert {"ruff", "mypy", "clang-format", "codespell"} <= set(dict(PIN.findall(text)))
    assert not disagreements(text, REQUIREMENTS)
    dependencies = re.findall(r"additional_dependencies: \[(.*)\]", text)
    assert len(dependencies) == text.count("- id:")
    assert all("==" in one for line in dependencies for one in line.split(","))


def test_the_site_and_the_wheels_are_built_with_the_same_versions():
    both = {name: version for name, version in pins("requirements-docs.txt").items() if name in REQUIREMENTS}
    assert both
    assert both.items() <= REQUIREMENTS.items()
    assert not disagreements((ROOT / "pyproject.toml").read_text(), REQUIREMENTS)


def test_the_rule_of_versions_can_fail():
    assert disagreements("[ruff==0.0.1, other==1, mypy==2]", {"ruff": "1", "mypy": "2"}) == ["ruff==0.0.1", "other==1"]


def test_every_tool_of_the_extras_is_pinned():
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    for extra, file in (("test", "requirements-dev.txt"), ("docs", "requirements-docs.txt")):
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]", section, re.MULTILINE)
        assert set(re.findall(r'"([\w-]+)"', listed)) <= set(pins(file)) | set(REQUIREMENTS), extra


def test_the_version_is_written_once():
    (project,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    (citation,) = re.findall(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project == citation == ffnet_kernels.__version__
    assert re.search(rf"^## \[(Unreleased\]: )?{re.escape(project)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_workflow_runs_what_the_project_calls_ci():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"^\s+- run: \.ci/run$", text, re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    for command in re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE):
        assert re.search(rf"^{command} ", readme, re.MULTILINE), command


def test_owned_paths_exist():
    for line in (ROOT / ".github" / "CODEOWNERS").read_text().splitlines():
        if line.startswith("/"):
            assert (ROOT / line.split()[0].strip("/")).exists(), line


def test_spelling():
    if subprocess.run([sys.executable, "-c", "import codespell_lib"], capture_output=True).returncode:
        pytest.skip("codespell is not installed")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = [n for n in tracked.stdout.split() if (ROOT / n).is_file()] if tracked.returncode == 0 else ["."]
    command = [sys.executable, "-m", "codespell_lib", *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
