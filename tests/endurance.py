"""What a machine does to a run: kill -9 at any instant, long runs, large pictures.

stress.py does hundreds, test_engine.py a few.
"""

import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401, which an optimizer imports: not in each fork anew
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

import data
import degrade
import evaluate
import model
import train
from vae import load_pretrained, load_weights

SCRIPTS = {"train.py": train, "data.py": data, "model.py": model, "evaluate.py": evaluate}
TRAIN = ["--batch_size", "2", "--resolution", "32", "--workers", "0"]
EVALUATE = Path(evaluate.__file__)
# tqdm's own lock is shared by all processes: one that is killed may hold it for ever
tqdm.set_lock(threading.RLock())


def start(command, folder):
    """Fork a process that runs one of the scripts in a folder, its output in folder/output.

    All is imported already, so it begins within milliseconds. -> its pid
    """
    torch.set_num_threads(1)  # before the fork: threads do not survive one
    pid = os.fork()
    if pid == 0:
        tqdm.set_lock(threading.RLock())
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = open("output", "a", buffering=1)  # noqa: SIM115
            sys.argv = [str(word) for word in command]
            degrade.run_script(SCRIPTS[command[0]].main)
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def end_of_output(folder):
    return (folder / "output").read_text()[-2000:]


def finish(command, folder):
    """Let it run to its end."""
    _, status = os.waitpid(start(command, folder), 0)
    assert os.waitstatus_to_exitcode(status) == 0, end_of_output(folder)


def nothing():
    pass


def kill_often(command, folder, kills, longest, check, ended=nothing):
    """Run a command, kill -9 after up to longest seconds, and check() what it left, many times.

    If it ends before, it has to end well, and ended() makes room for the next. command: words, or
    a function that returns them. -> how many were killed, how many ended
    """
    chance = random.Random(0)
    within = longest
    killed_count = 0
    ended_count = 0
    while killed_count < kills:
        pid = start(command() if callable(command) else command, folder)
        time.sleep(chance.uniform(0, within))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0, end_of_output(folder)
        check()
        # about half the times are before the end, wherever this machine has it
        if killed:
            killed_count += 1
            within = min(longest, within * 1.2)
        else:
            ended_count += 1
            within = within * 0.8
            ended()
    return killed_count, ended_count


def same_files(a, b):
    """Say whether two folders hold the same files."""
    names = []
    for folder in (a, b):
        paths = [path for path in folder.rglob("[!.]*") if path.is_file()]
        names.append(sorted(path.relative_to(folder) for path in paths))
    return names[0] == names[1] and all(same_file(a / name, b / name) for name in names[0])


def same_file(a, b):
    """Of safetensors, whose header has no fixed order, the tensors and the texts count."""
    if a.suffix == ".safetensors":
        return read_tensors(a) == read_tensors(b)
    return a.read_bytes() == b.read_bytes()


def read_tensors(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).tolist() for key in list(file.keys())}


# --------------------------------------------------------------------------------------------------
# kill -9.


def kill_training(csv, folder, kills):
    """-> the steps of the checkpoints that were found, all of which load."""
    loaded = set()
    run = folder / "run"

    def command():
        flags = ["--data", csv, "--save_every", 1, "--val_every", 3, "--steps", 100000]
        return ["train.py", *TRAIN, *flags, "--out", run, "--resume"]

    def check():
        if not (run / "latest").exists():
            return
        args = train.parse_args(["--resume", str(run)])
        config = model.read_run(run)["model"]
        for checkpoint in run.glob("step_*"):
            restorer = model.build_restorer(config)
            load_weights(restorer, checkpoint / "model.safetensors")
            state = train.State(config, restorer, args)
            state.load(checkpoint)
            loaded.add(state.step)

    kill_often(command, folder, kills, 1.5, check)
    return loaded


def kill_caching(csv, folder, kills):
    """-> killed, ended; the cache is in the end what it would have been."""
    command = ["data.py", "cache", "--data", csv, "--resolution", 32, "--epochs", 12]
    command += ["--workers", 0, "--out"]

    def check():
        for path in (folder / "cache").glob("*/[!.]*.safetensors"):
            with safe_open(path, "pt") as file:
                assert file.get_tensor("clean").dtype == torch.float16

    def clear():
        shutil.rmtree(folder / "cache")

    done = kill_often([*command, "cache"], folder, kills, 0.8, check, clear)
    finish([*command, "cache"], folder)
    finish([*command, "whole"], folder)
    assert same_files(folder / "cache", folder / "whole")
    return done


def kill_pairs(photos, folder, kills):
    command = ["data.py", "pairs", photos, "--out"]
    pairs = folder / "pairs"

    def check():
        for path in pairs.rglob("[!.]*.png"):
            Image.open(path).load()
        if (pairs / "pairs.csv").exists():
            assert len(data.CsvPairs(pairs / "pairs.csv")) == len(list(photos.glob("*.png")))
            if not (pairs / "begun.json").exists():  # killed when all was done
                shutil.rmtree(pairs)

    done = kill_often([*command, "pairs"], folder, kills, 0.6, check)
    finish([*command, "pairs"], folder)
    finish([*command, "whole"], folder)
    assert same_files(pairs, folder / "whole")
    return done


def kill_export(run, folder, kills):
    def check():
        if (folder / "out/config.json").exists():
            load_pretrained(model.Sana, folder / "out")
            shutil.rmtree(folder / "out")

    return kill_often(["model.py", "export", run, "out"], folder, kills, 0.4, check)


def kill_evaluation(run, photos, folder, kills):
    """Half of them while a folder is restored, half while pairs are measured."""
    paths = sorted(photos.glob("*.png"))
    (folder / "photos.csv").write_text("image_path\n" + "".join(f"{path}\n" for path in paths))

    def check():
        for path in folder.glob("restored/[!.]*.png"):
            Image.open(path).load()
        if (folder / "scores/scores.json").exists():
            scores = json.loads((folder / "scores/scores.json").read_text())
            assert len(scores["images"]) == len(paths)
        shutil.rmtree(folder / "scores", ignore_errors=True)  # the next claims it anew

    def clear():
        shutil.rmtree(folder / "restored", ignore_errors=True)

    evaluating = ["evaluate.py", "--checkpoint", run]
    restoring = [*evaluating, "--input", photos, "--output", "restored"]
    measuring = [*evaluating, "--data", "photos.csv", "--metrics", "psnr", "--output", "scores"]
    first = kill_often(restoring, folder, kills // 2, 1.6, check, clear)
    second = kill_often(measuring, folder, kills // 2, 1.6, check, clear)
    finish(restoring, folder)
    assert len(list((folder / "restored").glob("[!.]*.png"))) == len(paths)
    return first[0] + second[0], first[1] + second[1]


# --------------------------------------------------------------------------------------------------
# Long, many, large.


def read_losses(log):
    """Return the lines of a log.jsonl that have a loss; the last may be half written."""
    lines = []
    for text in log.read_text().splitlines():
        if text.endswith("}") and '"loss"' in text:
            lines.append(json.loads(text))
    return lines


def peak_now(pid):
    """Return the GB of memory that a process has taken at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20


def long_training(folder, steps=20_000):
    """-> GB of peak memory after a tenth of the steps, and at the end;

    the median seconds of a step in the second, and in the last tenth.
    """
    flags = ["--batch_size", 1, "--resolution", 16, "--workers", 1, "--steps", steps]
    flags += ["--val_every", steps // 4, "--save_every", 1000, "--out", "run"]
    pid = start(["train.py", *flags], folder)
    log = folder / "run/log.jsonl"
    early = None
    ended = 0
    while not ended:
        time.sleep(0.2)
        if not early and log.exists() and len(read_losses(log)) >= steps // 500:
            early = peak_now(pid)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
    assert os.waitstatus_to_exitcode(status) == 0, end_of_output(folder)
    late = usage.ru_maxrss / 2**20
    lines = read_losses(log)
    tenth = len(lines) // 10
    seconds = []
    for part in (lines[tenth : 2 * tenth], lines[-tenth:]):
        seconds.append(statistics.median(1 / line["images_per_second"] for line in part))
    return early, late, *seconds


def peak_of(command, folder):
    """Run a command in a process of its own -> seconds, GB of peak memory."""
    before = time.monotonic()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = []
    for number in (1, 2):
        files.append((os.POSIX_SPAWN_OPEN, number, str(folder / "output"), flags, 0o644))
    words = [sys.executable, *map(str, command)]
    pid = os.posix_spawn(sys.executable, words, os.environ, file_actions=files)
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, end_of_output(folder)
    return time.monotonic() - before, usage.ru_maxrss / 2**20


def many_pictures(run, folder, count=2000):
    """-> GB of peak memory for a twentieth of the pictures, and for all."""
    picture = data.dead_leaves(64, np.random.default_rng(0))
    result = []
    for n in (count // 20, count):
        pictures = folder / str(n)
        restored = folder / f"out{n}"
        pictures.mkdir()
        for i in range(n):
            picture.save(pictures / f"{i}.png")
        flags = ["--checkpoint", run, "--input", pictures, "--output", restored]
        _, memory = peak_of([EVALUATE, *flags], folder)
        result.append(memory)
        assert len(list(restored.glob("[!.]*.png"))) == n
    return tuple(result)


def large_picture(run, folder, side=10_000):
    """-> seconds and GB for one picture of side x side pixels."""
    tile = data.dead_leaves(500, np.random.default_rng(0))
    picture = Image.new("RGB", (side, side))
    for x in range(0, side, 500):
        for y in range(0, side, 500):
            picture.paste(tile, (x, y))
    picture.save(folder / "large.png", compress_level=1)
    flags = ["--checkpoint", run, "--input", folder / "large.png"]
    result = peak_of([EVALUATE, *flags, "--output", folder / "restored.png"], folder)
    with Image.open(folder / "restored.png") as restored:
        assert restored.size == (side, side)
    return result


def large_csv(photos, folder, rows=100_000):
    """-> seconds until the data sets of so many rows stand, GB that they added."""
    paths = sorted(photos.glob("*.png"))
    lines = ["image_path,condition_image_path,caption"]
    for i in range(rows):
        lines.append(f"{paths[i % len(paths)]},,number {i}")
    (folder / "large.csv").write_text("\n".join(lines) + "\n")
    args = train.parse_args(["--data", str(folder / "large.csv"), "--resolution", "32"])
    before = time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train_set, _ = data.make_datasets(args)
    train_set.draw(5)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return time.monotonic() - before, more / 2**20
