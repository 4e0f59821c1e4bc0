"""Every path on a pretend GPU, which torch would keep: so in a process of its own."""

import subprocess
import sys

from conftest import ROOT


def test_on_a_pretend_gpu():
    command = [sys.executable, "-m", "pytest", "tests/on_pretend.py", "-n", "0", "-q"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
