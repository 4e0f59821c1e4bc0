"""What a machine does to a run: kill -9 at any instant, long runs, large pictures. stress.py does hundreds, test_engine.py a few."""
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import time
import traceback

import numpy as np
import torch
import torch._dynamo  # noqa: F401, which an optimizer imports: not in each fork anew
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import data
import degrade
import evaluate
import model
import train

SCRIPTS = {"train.py": train, "data.py": data, "model.py": model, "evaluate.py": evaluate}
TRAIN = ["--batch_size", "2", "--resolution", "32", "--workers", "0"]


def start(command, folder):
    """Fork a process that runs one of the scripts in a folder, its output in folder/output: all is imported already, so it begins within
    milliseconds. -> its pid."""
    torch.set_num_threads(1)  # before the fork: threads do not survive one
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            sys.stdout = sys.stderr = open("output", "a", buffering=1)
            sys.argv = list(map(str, command))
            degrade.run_script(SCRIPTS[command[0]].main)
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def kill_often(command, folder, kills, longest, check, ended=lambda: None):
    """Run command, kill -9 after a random time of up to longest seconds, look with check() at what it left, again and again. If it ends before,
    it has to end well, and ended() makes room for the next. -> how many were killed, how many ended."""
    chance, done, within = random.Random(0), [0, 0], longest
    while done[0] < kills:
        pid = start(command() if callable(command) else command, folder)
        time.sleep(chance.uniform(0, within))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0, (folder / "output").read_text()[-2000:]
        done[not killed] += 1
        within = min(longest, within * (1.2 if killed else 0.8))  # about half the times are before the end, wherever this machine has it
        check()
        if not killed:
            ended()
    return tuple(done)


def finish(command, folder):
    """Let it run to its end."""
    _, status = os.waitpid(start(command, folder), 0)
    assert os.WEXITSTATUS(status) == 0, (folder / "output").read_text()[-2000:]


def kill_training(csv, folder, kills):
    """-> the steps of the checkpoints that were found, all of which load."""
    loaded, run = set(), folder / "run"

    def command():
        begun = ["--resume"] if (run / "latest").exists() else []
        return ["train.py", *TRAIN, "--data", csv, "--save_every", 1, "--val_every", 3, "--steps", 100000, "--keep", 2, "--out", run, *begun]

    def check():
        if (run / "latest").exists():
            args = train.parse_args(["--resume", str(run)])
            state = train.State(train.read_run(run)["model"], data.PixelAE(2), data.Prompts(), args)
            for checkpoint in run.glob("step_*"):
                state.load(checkpoint)
                loaded.add(state.step)
    kill_often(command, folder, kills, 1.5, check)
    return loaded


def same_files(a, b):
    """Whether two folders hold the same; of safetensors, whose header has no fixed order, the tensors and the texts."""
    def content(path):
        if path.suffix != ".safetensors":
            return path.read_bytes()
        with safe_open(path, "pt") as file:
            return file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}
    names = [sorted(str(path.relative_to(f)) for path in f.rglob("[!.]*") if path.is_file()) for f in (a, b)]
    return names[0] == names[1] and all(content(a / name) == content(b / name) for name in names[0])


def kill_caching(csv, folder, kills):
    """-> killed, ended; the cache is in the end what it would have been."""
    data.SHARD, shard = 8, data.SHARD
    command = ["data.py", "cache", "--data", csv, "--resolution", 32, "--epochs", 12, "--workers", 0, "--out"]

    def check():
        for path in (folder / "cache").glob("draws_*"):
            assert load_file(path)["clean"].dtype == torch.float16
    try:
        done = kill_often([*command, "cache"], folder, kills, 0.8, check, lambda: shutil.rmtree(folder / "cache"))
        finish([*command, "cache"], folder), finish([*command, "whole"], folder)
    finally:
        data.SHARD = shard
    assert same_files(folder / "cache", folder / "whole")
    return done


def kill_pairs(photos, folder, kills):
    command = ["data.py", "pairs", photos, "--out"]

    def check():
        for path in (folder / "pairs").rglob("[!.]*.png"):
            Image.open(path).load()
        if (folder / "pairs/pairs.csv").exists():
            assert len(data.CsvPairs(folder / "pairs/pairs.csv")) == len(list(photos.glob("*.png")))
            if not (folder / "pairs/begun.json").exists():  # killed when all was done
                shutil.rmtree(folder / "pairs")
    done = kill_often([*command, "pairs"], folder, kills, 0.6, check)
    finish([*command, "pairs"], folder), finish([*command, "whole"], folder)
    assert same_files(folder / "pairs", folder / "whole")
    return done


def kill_export(run, folder, kills):
    def check():
        if (folder / "out/config.json").exists():
            model.Sana.from_pretrained(folder / "out")
            shutil.rmtree(folder / "out")
    return kill_often(["model.py", "export", run, "out"], folder, kills, 0.4, check)


def kill_evaluation(run, photos, folder, kills):
    """Half of them while a folder is restored, half while pairs are measured."""
    (folder / "photos.csv").write_text("image_path\n" + "".join(f"{path}\n" for path in sorted(photos.glob("*.png"))))

    def check():
        for path in folder.glob("restored/[!.]*.png"):
            Image.open(path).load()
        if (folder / "scores/scores.json").exists():
            assert len(json.loads((folder / "scores/scores.json").read_text())["images"]) == len(list(photos.glob("*.png")))
    clear = lambda: [shutil.rmtree(folder / name, ignore_errors=True) for name in ("restored", "scores")]
    restoring = ["evaluate.py", "--checkpoint", run, "--input", photos, "--output", "restored"]
    measuring = ["evaluate.py", "--checkpoint", run, "--data", "photos.csv", "--metrics", "psnr", "--output", "scores"]
    done = [kill_often(command, folder, kills // 2, 1.6, check, clear) for command in (restoring, measuring)]
    finish(restoring, folder)
    assert len(list((folder / "restored").glob("[!.]*.png"))) == len(list(photos.glob("*.png")))
    return tuple(map(sum, zip(*done)))


def long_training(folder, steps=20_000):
    """-> GB of peak memory after a tenth of the steps and at the end; the median seconds of a step in the second and in the last tenth."""
    finish(["train.py", "--batch_size", 1, "--resolution", 16, "--workers", 1, "--steps", steps, "--val_every", steps // 4, "--save_every", 1000, "--out", "run"], folder)
    lines = [line for line in map(json.loads, (folder / "run/log.jsonl").read_text().splitlines()) if "loss" in line]
    tenth = len(lines) // 10
    seconds = [statistics.median(1 / line["images_per_second"] for line in part) for part in (lines[tenth:2 * tenth], lines[-tenth:])]
    return lines[tenth]["memory_gb"], lines[-1]["memory_gb"], *seconds


def peak_of(command, folder):
    """-> (seconds, GB of peak memory) of a command in a process of its own."""
    before = time.monotonic()
    pid = os.posix_spawn(sys.executable, [sys.executable, *map(str, command)], os.environ | {"PWD": str(folder)},
                         file_actions=[(os.POSIX_SPAWN_OPEN, n, str(folder / "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for n in (1, 2)])
    _, status, usage = os.wait4(pid, 0)
    assert os.WEXITSTATUS(status) == 0, (folder / "output").read_text()[-2000:]
    return time.monotonic() - before, usage.ru_maxrss / 2**20


def many_pictures(run, folder, count=2000):
    """-> GB of peak memory for a twentieth of the pictures, and for all."""
    picture = degrade.dead_leaves(64, np.random.default_rng(0))
    result = []
    for n in (count // 20, count):
        pictures = folder / str(n)
        pictures.mkdir()
        for i in range(n):
            picture.save(pictures / f"{i}.png")
        result.append(peak_of([train.__file__.replace("train", "evaluate"), "--checkpoint", run, "--input", pictures, "--output", folder / f"out{n}"], folder)[1])
        assert len(list((folder / f"out{n}").glob("[!.]*.png"))) == n
    return tuple(result)


def large_picture(run, folder, side=10_000):
    """-> seconds and GB for one picture of side x side pixels."""
    tile = degrade.dead_leaves(500, np.random.default_rng(0))
    picture = Image.new("RGB", (side, side))
    for x in range(0, side, 500):
        for y in range(0, side, 500):
            picture.paste(tile, (x, y))
    picture.save(folder / "large.png", compress_level=1)
    result = peak_of([train.__file__.replace("train", "evaluate"), "--checkpoint", run, "--input", folder / "large.png", "--output", folder / "restored.png"], folder)
    with Image.open(folder / "restored.png") as restored:
        assert restored.size == (side, side)
    return result


def large_csv(photos, folder, rows=100_000):
    """-> seconds until the data sets of so many rows stand, GB that they added."""
    paths = sorted(photos.glob("*.png"))
    (folder / "large.csv").write_text("image_path,condition_image_path,caption\n" + "".join(f"{paths[i % len(paths)]},,number {i}\n" for i in range(rows)))
    args = train.parse_args(["--data", str(folder / "large.csv"), "--resolution", "32"])
    before, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train_set, _ = data.make_datasets(args)
    train_set.draw(5)
    return time.monotonic() - before, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 2**20
