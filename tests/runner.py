"""Runs the project's scripts in processes forked from one that has torch imported already.

They start in 0.1 s instead of four.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "safetensors.torch",
        "PIL.Image",
        "tqdm",
    ]
)


def run_child(command, cwd, env, output):
    """Become the script command[0], with its output in the files output/1 and output/2."""
    import torch

    for number in (1, 2):
        file = os.open(f"{output}/{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    script = str(ROOT / command[0])
    sys.argv = [script, *command[1:]]
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process would leave without


def run_script(command, cwd, env, timeout=600):
    """Run ROOT/command[0] in the folder cwd, with the other words as its flags.

    -> exit status, stdout, stderr
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as output:
        process = CONTEXT.Process(target=run_child, args=(words, str(cwd), dict(env), output))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{command} took more than {timeout} s")
        stdout = (Path(output) / "1").read_text()
        stderr = (Path(output) / "2").read_text()
        return process.exitcode, stdout, stderr
