"""Every command of README.md and tests/BENCH.md, in their order and in one folder.

As it is printed, but for flags that make it small. And every link.
"""

import ast
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from test_commands import run
from test_house import FILES

PAGES = {
    "README.md": (ROOT / "README.md").read_text(encoding="utf-8"),
    "tests/BENCH.md": (ROOT / "tests/BENCH.md").read_text(encoding="utf-8"),
}
# What a page takes from the other one.
BEFORE = {"README.md": [], "tests/BENCH.md": ["python data.py pairs PHOTOS --out pairs"]}
SMALL = "--steps 2 --batch_size 4 --resolution 32 --val_every 2"
# What a command begins with (the longest one counts): flags that are appended, and what it must
# say. A command that is not here fails the test.
KNOWN = {
    "python train.py": (SMALL, r"PSNR [\d.]+ -> [\d.]+ dB"),
    "python train.py --resume": ("--steps 3", r"validated at step 3 on .* PSNR [\d.]+ ->"),
    "python train.py --data photos.csv --model mini": (SMALL, r"images: PSNR [\d.]+ dB"),
    "python evaluate.py": ("", r"degraded input +\d"),
    "python evaluate.py --data": ("", r"conditions +\d"),
    "python evaluate.py --checkpoint out/demo --input": ("--overwrite", r"restored [1-9]\d* im"),
    "python evaluate.py --checkpoint out/pairs --input": ("--overwrite --steps 2", r"restored \d"),
    "python data.py pairs": ("", r"[1-9]\d* pairs in"),
    "python data.py match": ("", r"1 pairs in"),
    "python data.py cache": ("--resolution 32", r"[1-9]\d* draws"),
    "python degrade.py": ("", ""),
    "python model.py export": ("", "M parameters, in_channels"),
    "python tests/attacks.py": ("tables --draws 20", r"worked, \d+ refused in one line"),
    "python tests/bench.py optimizer": ("--quick --threads 1", r"adamw_bf16: ours, eager +\d"),
    "python tests/bench.py memory": ("", "1,604,6"),
    "python tests/bench.py cost": ("--quick", r"the update without a compiler +\d"),
    "python tests/bench.py decoder": ("--quick --threads 1", "in skips"),
    "python tests/bench.py convolutions": ("--minutes 0.02", r"minutes, 1 threads: .* s a photo"),
    "python tests/pictures.py": ("", r"assets/\w+.jpg: \d+x\d+"),
    "torchrun": (SMALL, r"on 2 x cpu.*PSNR [\d.]+ -> [\d.]+ dB"),
}
# In the text these name what a whole command shows elsewhere.
NAMES = {
    "python tests/bench.py",
    "python data.py pairs",
    "python data.py cache",
    "python model.py export",
}


def commands(text):
    """Return the commands of a page. A block of Python is one command of several lines."""
    found = []
    for kind, block, words in re.findall(r"^```(\w*)\n(.*?)^```$|`([^`]+)`", text, re.M | re.S):
        if kind == "python":
            found.append(block)
        elif block and not kind:  # a kind: not commands
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                found += line.split(" && ")
        else:
            for part in " ".join(words.split()).split(" && "):
                if re.match(r"(\S*python|pip|torchrun) ", part):
                    found.append(part)
    return list(dict.fromkeys(found))


def make_inputs(folder, photos, pipeline_folder, published):
    """Make what the README takes for granted; the published model is a toy under its name."""
    pictures = sorted(photos.glob("*.png"))
    places = {
        "PHOTOS": pictures,
        "OTHER_PHOTOS": pictures[:3],
        "KODAK": pictures[:2],
        "photos": pictures[:2],
        "scans/old": pictures[2:3],
    }
    for place, some in places.items():
        (folder / place).mkdir(parents=True)
        for picture in some:
            shutil.copy(picture, folder / place)
    layouts = ["CLEAN/1.png", "DEGRADED/1.png", "THEIRS/1.png", "GOPRO/train/a/sharp/1.png"]
    layouts += ["GOPRO/train/a/blur/1.png", "SIDD/1_GT.png", "SIDD/1_NOISY.png"]
    layouts += ["HR/1.png", "LR/1x4.png"]
    for layout in layouts:
        (folder / layout).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[0], folder / layout)
    for name in ("noisy.jpg", "photo.jpg"):
        Image.open(pictures[0]).save(folder / name)
    for name, place in [("photos", "PHOTOS"), ("bsd432", "PHOTOS"), ("kodak", "KODAK")]:
        lines = ["image_path"] + [f"{place}/{path.name}" for path in places[place]]
        (folder / f"{name}.csv").write_text("\n".join(lines))
    shutil.copy(published["alex"], folder / "TRUNK")
    shutil.copy(published["alex heads"], folder / "HEADS")
    shutil.copytree(pipeline_folder, folder / "sana1.5-1.6b")
    (folder / "train.py").symlink_to(ROOT / "train.py")  # torchrun takes it from where it is run


def torchrun(words, cwd):
    """Run two processes instead of sixteen or eight; several machines are several torchruns."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    machines = 2 if "--nnodes=2" in words else 1
    changed = []
    for word in words[1:]:
        word = word.replace("HOST:29500", f"localhost:{port}")
        changed.append(re.sub("(?<=--nproc_per_node=)8", str(2 // machines), word))
    program = Path(sys.executable).with_name("torchrun")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options |= {"cwd": cwd, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    processes = []
    for _ in range(machines):
        processes.append(subprocess.Popen([program, *changed], **options))
    output = "".join(process.communicate(timeout=300)[0] for process in processes)
    assert not any(process.returncode for process in processes), output
    return output


def run_folder(words):
    """Return the folder that a command of train.py writes to."""
    given = dict(zip(words, words[1:]))  # a flag: the word after it
    name = Path(given["--data"]).stem if "--data" in words else "demo"
    return given.get("--out") or given.get("--resume") or f"out/{name}"


def outputs(words):
    """Return the files that the command's own words promise."""
    given = dict(zip(words, words[1:]))  # a flag: the word after it
    promised = [given[flag] for flag in ("--out", "--output") if flag in given]
    if "train.py" in words:
        promised.append(f"{run_folder(words)}/latest")
    if words[1] == "evaluate.py" and "--data" in words:
        names = ["scores.csv", "scores.json", "grid.png"]
        promised += [f"out/evaluation*/{name}" for name in names]
    if words[1] == "degrade.py":
        promised.append(words[3])
    if words[1] == "tests/pictures.py":
        promised.append(words[4])
    if words[1:3] == ["model.py", "export"]:
        promised.append(words[4])
    return promised


def known_start(command):
    """Return the longest beginning in KNOWN of a command."""
    fitting = [start for start in KNOWN if f"{command} ".startswith(f"{start} ")]
    assert fitting, f"a page has a command that this test does not know: {command}"
    return max(fitting, key=len)


def shell_commands():
    """Return the commands of all pages, but Python, pip and pytest, and names alone.

    test_published.py runs the check of published weights: of toy weights its status is 1.
    """
    found = []
    for text in PAGES.values():
        found += commands(text)
    others = r"pip install|python -m pytest tests( -k cuda)?$|python tests/published.py$"
    found = [command for command in found if "\n" not in command and not re.match(others, command)]
    return [command for command in found if command not in NAMES]


def test_every_known_command_is_printed():
    whole = shell_commands()
    for name in NAMES:
        assert any(command.startswith(name) for command in whole), name
    assert {known_start(command) for command in whole} == KNOWN.keys()


@pytest.mark.parametrize("page", list(PAGES))
def test_every_command_runs_as_printed(
    page, photos, pipeline_folder, published, tmp_path, monkeypatch
):
    make_inputs(tmp_path, photos, pipeline_folder, published)
    monkeypatch.chdir(tmp_path)
    shell = shell_commands()
    for command in BEFORE[page] + commands(PAGES[page]):
        if "\n" in command:
            exec(command, {})
            for path in re.findall(r'save\("(.*?)"\)', command):
                assert (tmp_path / path).is_file(), command
        elif command in shell:
            run_small(command, tmp_path)


def run_small(command, folder):
    """Run a command with the flags that make it small, and look at what it says and writes."""
    more, says = KNOWN[known_start(command)]
    words = shlex.split(re.sub(r"\bNAME\b", "jpeg", command))
    all_words = words + shlex.split(more)
    if "train.py" in words and "--resume" not in words:  # a page may train in a folder again
        shutil.rmtree(folder / run_folder(words), ignore_errors=True)
    start = time.time()
    if words[0] == "torchrun":
        output = torchrun(all_words, folder)
    else:
        output = run(*all_words[1:], cwd=folder)
    print(f"{time.time() - start:.0f} s: {command}")
    assert re.search(says, output, re.S), (command, output)
    for path in outputs(words):
        times = [found.stat().st_mtime for found in folder.glob(path)]
        assert times, (command, path)
        assert max(times) >= start - 1, (command, path)


def test_the_install_and_test_command_is_the_one_that_ci_runs():
    script = (ROOT / ".ci/run").read_text()
    assert 'eval "$command"' in script
    search = re.search(r"\$\((grep .*?)\)\n", script)[1]
    found = subprocess.run(search, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    *installs, tests = found.stdout.strip().split(" && ")
    assert tests == "python -m pytest tests"
    readme = commands(PAGES["README.md"])
    assert all(part in readme for part in (*installs, tests))
    for command in readme:
        if command.startswith("pip install"):
            files = re.findall(r"-r (\S+)", command)
            assert command == "pip install " + " ".join(f"-r {file}" for file in files)
            assert all((ROOT / file).is_file() for file in files)


def anchor(heading):
    """Return GitHub's name of a heading, for links."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", list(PAGES))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        name, _, part = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), target
        if file.suffix == ".md" and part:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert part in map(anchor, headings), target


def test_the_reading_path_leads_where_the_readme_says():
    """Each stop begins at its line and is as long as printed."""
    length = {}  # of what begins at a line of a file
    for file in FILES:
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name = node.name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
            else:
                continue
            length[name, f"{file}.py", node.lineno] = node.end_lineno - node.lineno + 1
    total = 0
    for line in PAGES["README.md"].splitlines():
        links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", line)
        lengths = [length[name, file, int(number)] for name, file, number in links]
        printed = re.match(r"\| (\[`.*) \| (\d+) \| ", line)
        if printed:
            stops = len(re.findall(r"\]\(", printed.group(1)))
            assert sum(lengths[:stops]) == int(printed.group(2)), line
            total += sum(lengths[:stops])
    assert 350 < total < 450
