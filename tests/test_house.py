"""The house: which file imports which, what else it imports, what importing does, and the lint."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from runner import run_script

FILES = ["degrade", "vae", "model", "data", "evaluate", "train"]  # in reading order
PACKAGES = {"torch", "safetensors", "huggingface_hub", "PIL", "numpy", "tqdm"}
UNIX = {"fcntl", "resource", "termios", "pwd", "grp", "ctypes"}


def imported(name):
    """The top-level modules that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    return modules


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_stands_before_it(name):
    earlier = set(FILES[: FILES.index(name)])
    allowed = PACKAGES | set(sys.stdlib_module_names) - UNIX | earlier
    assert imported(name) - allowed == set()


def test_importing_prints_nothing_reads_no_flag_and_makes_no_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import " + ", ".join(FILES))
    folder = tmp_path / "empty"
    folder.mkdir()
    assert run_script([script, "--no-such-flag"], folder, os.environ) == (0, "", "")
    assert list(folder.iterdir()) == []


def test_the_top_level_holds_the_six_files_and_little_else():
    command = ["git", "ls-files"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines()}
    others = {"README.md", "LICENSE", "requirements.txt", ".gitignore", ".ci", "assets", "tests"}
    assert top == {f"{name}.py" for name in FILES} | others


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    # B905: zip of lists that are made side by side. SIM108: an `if` may be clearer than a ternary.
    rules = ["--line-length", "100", "--select", "E,F,B,SIM", "--ignore", "B905,SIM108"]
    in_tests = ["E731", "SIM117", "B023"]  # lambdas that are called at once; nested with blocks
    ignores = ",".join(f"tests/*:{rule}" for rule in in_tests)
    command += [*rules, "--per-file-ignores", ignores, "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_how_threads_wait_is_set_before_torch_is_imported(name):
    """OpenMP reads it once, when torch loads it."""
    lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
    setting = lines.index('os.environ.setdefault("GOMP_SPINCOUNT", "500")')
    importing = [i for i, line in enumerate(lines) if re.match("(import|from) torch", line)]
    before = set(re.findall(r"^import (\w+)", "\n".join(lines[:setting]), re.M))
    assert setting < min(importing)
    assert before <= set(sys.stdlib_module_names)
