"""Every command of the README, in its order and in one folder, as it is printed but for flags that make it small."""
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from conftest import ROOT
from test_commands import run

README = (ROOT / "README.md").read_text()
# What a command begins with (the longest one counts): flags that are appended, and what it must say. A command that is not here fails the test.
KNOWN = {
    "python train.py": ("--steps 4 --batch_size 4 --resolution 32 --val_every 4 --workers 0 --overwrite", r"PSNR [\d.]+ -> [\d.]+ dB"),
    "python train.py --resume": ("--steps 6", r"step 6, .* PSNR [\d.]+ -> [\d.]+ dB"),
    "python evaluate.py": ("", r"degraded input +\d"),
    "python evaluate.py --checkpoint out/demo --input": ("--overwrite", r"restored [1-9]\d* image"),
    "python evaluate.py --checkpoint out/pairs --input": ("--overwrite --steps 2", r"restored [1-9]\d* image"),
    "python data.py pairs": ("", r"[1-9]\d* pairs in"),
    "python data.py cache": ("--resolution 32 --workers 0", r"[1-9]\d* draws"),
    "python degrade.py": ("", ""),
    "python model.py export": ("", "M parameters, in_channels"),
    "python tests/stress.py": ("tables rows --share 0.01", r"worked, \d+ refused in one line.*a CSV of"),
    "python tests/bench.py optimizer": ("--quick --threads 1", r"adamw_sr: ours +\d"),
    "python tests/bench.py memory": ("", "1,604,6"),
    "python tests/bench.py degradations": ("--quick --threads 1", r"recipes of 1 to 3, .*: \d+ images/s"),
    "torchrun": ("--batch_size 4 --steps 4 --resolution 32 --val_every 4 --workers 0 --overwrite", r"on 2 x cpu: .*PSNR [\d.]+ -> [\d.]+ dB"),
}
NAMES = {"python tests/bench.py", "python data.py pairs", "python data.py cache", "python model.py export"}  # in the text these name what a whole command shows elsewhere


def commands():
    """The lines of the README's code blocks, and the code between its words that begins with a program."""
    found = []
    for block, words in re.findall(r"^```\w*\n(.*?)^```$|`([^`]+)`", README, re.M | re.S):
        lines = re.sub(r"\\\n\s*", "", block).splitlines() or [" ".join(words.split())]
        found += [part for line in lines for part in line.split(" && ") if block or re.match(r"(\S*python|pip|torchrun) ", line)]
    return list(dict.fromkeys(found))


def make_inputs(folder, photos, pipeline_folder):
    """What the README takes for granted: photos, lists of them, a program's outputs, and the published model (a toy under its name)."""
    pictures = sorted(photos.glob("*.png"))
    places = {"PHOTOS": pictures, "OTHER_PHOTOS": pictures[:3], "KODAK": pictures[:2], "photos": pictures[:2], "scans/old": pictures[2:3], "OTHERS": []}
    for place, some in places.items():
        (folder / place).mkdir(parents=True)
        for picture in some:
            shutil.copy(picture, folder / place)
    for i, picture in enumerate(pictures[:3]):  # named like those of `data.py pairs OTHER_PHOTOS`
        shutil.copy(picture, folder / f"OTHERS/{i:05d}_{picture.name}")
    for name in ("noisy.jpg", "photo.jpg"):
        Image.open(pictures[0]).save(folder / name)
    for name, place in (("photos", "PHOTOS"), ("bsd432", "PHOTOS"), ("kodak", "KODAK")):
        (folder / f"{name}.csv").write_text("image_path\n" + "".join(f"{place}/{path.name}\n" for path in places[place]))
    shutil.copytree(pipeline_folder, folder / "sana1.5-1.6b")
    (folder / "train.py").symlink_to(ROOT / "train.py")  # torchrun takes it from where it is run


def torchrun(words, cwd):
    """Two processes instead of sixteen or eight; several machines are as many torchruns, that meet on this one. -> their output."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    machines = 2 if "--nnodes=2" in words else 1
    words = [word.replace("HOST:29500", f"localhost:{port}") for word in words]
    words = [re.sub("(?<=--nproc_per_node=)8", str(2 // machines), word) for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([Path(sys.executable).with_name("torchrun"), *words[1:]], cwd=cwd, env=environment, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(machines)]
    output = "".join(process.communicate(timeout=300)[0] for process in processes)
    assert not any(process.returncode for process in processes), output
    return output


def outputs(words):
    """The files that the command's own words promise."""
    promised = [word for flag, word in zip(words, words[1:]) if flag in ("--out", "--output", "--grid")]
    if "train.py" in words and "--out" not in words:
        promised.append(f"out/{Path(words[words.index('--data') + 1]).stem if '--data' in words else 'pairs' if '--resume' in words else 'demo'}/latest")
    if words[1] == "evaluate.py" and "--data" in words:
        promised += ["out/evaluation/scores.csv", "out/evaluation/scores.json", "out/evaluation/grid.png"] + ["out/evaluation/sweep.png"] * ("--sweep" in words)
    return promised + words[3:4] * (words[1] == "degrade.py") + words[4:5] * (words[1:3] == ["model.py", "export"])


def test_every_command_runs_as_printed(photos, pipeline_folder, tmp_path):
    make_inputs(tmp_path, photos, pipeline_folder)
    whole, seen = [command for command in commands() if command not in NAMES], set()
    for command in whole:
        if re.match(r"pip install|python -m pytest tests$", command):
            continue  # the next test
        known = max((start for start in KNOWN if f"{command} ".startswith(f"{start} ")), key=len, default=None)
        assert known, f"the README has a command that this test does not know how to run: {command}"
        seen.add(known)
        extra, says = KNOWN[known]
        words, start = shlex.split(re.sub(r"\bNAME\b", "jpeg", command)), time.time()
        more = shlex.split(extra)
        output = torchrun(words + more, tmp_path) if words[0] == "torchrun" else run(*words[1:], *more, cwd=tmp_path)
        assert re.search(says, output, re.S), (command, output)
        for path in outputs(words):
            assert (tmp_path / path).exists() and (tmp_path / path).stat().st_mtime >= start - 1, (command, path)
    assert seen == KNOWN.keys(), f"no longer in the README: {KNOWN.keys() - seen}"
    assert all(any(command.startswith(name) for command in whole) for name in NAMES)


def test_the_install_and_test_command_is_the_one_that_ci_runs():
    script = (ROOT / ".ci/run").read_text()
    first = subprocess.run(["bash", "-c", re.search(r"\$\((grep .*?)\)\n", script)[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    *installs, tests = first.split(" && ")
    assert tests == "python -m pytest tests" and all(part in commands() for part in (*installs, tests)) and 'eval "$command"' in script
    for command in (command for command in commands() if command.startswith("pip install")):
        files = re.findall(r"-r (\S+)", command)
        assert command == "pip install " + " ".join(f"-r {file}" for file in files) and all((ROOT / file).is_file() for file in files)
