"""Settings, a run's folder, the optimizer against torch's, and the loop."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch._inductor.metrics as metrics
from PIL import Image
from pipeline import SANA, randomize
from safetensors.torch import load_file
from test_commands import read_log

import data
import evaluate
import model
import train
from degrade import UserError
from model import Sana
from train import adamw_bf16, join_fp32, round_stochastically, split_fp32
from vae import file_digest

SCRIPTS = {"train.py": train, "data.py": data, "model.py": model, "evaluate.py": evaluate}
SMALL = ["--batch_size", 2, "--resolution", 32, "--val_every", 40, "--save_every", 20]
SMALL += ["--device", "cpu"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def call(script, *flags, cwd, stop=None, by=signal.SIGTERM, threads=1):
    """Run a script's main() in this process, in the folder cwd -> what it prints.

    So its functions can be replaced, and nothing is imported anew. stop: send the signal by in that
    training step (from 1), as whose end it saves. Raises what main does.
    """
    output = io.StringIO()
    before = {number: signal.getsignal(number) for number in train.SIGNALS}
    train_step = train.train_step

    def stopping(state, *rest):
        if state.step + 1 == stop:
            os.kill(os.getpid(), by)
        return train_step(state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        if stop:
            patch.setattr(train, "train_step", stopping)
        torch.set_num_threads(threads)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                if stop:
                    with pytest.raises(SystemExit, match=str(128 + by)):
                        train.main()
                else:
                    SCRIPTS[script].main()
        finally:
            torch.set_num_threads(1)
            for number, handler in before.items():
                signal.signal(number, handler)
    return output.getvalue()


def refused(script, *flags, cwd):
    """Return the line with which a script refuses these flags."""
    with pytest.raises(UserError) as error:
        call(script, *flags, cwd=cwd)
    return str(error.value)


def parse(*flags):
    return train.parse_args([str(word) for word in flags])


def load_newest(run_folder, name="model"):
    return load_file(model.find_checkpoint(run_folder) / f"{name}.safetensors")


def assert_same_checkpoint(run_folder, other):
    """The newest checkpoints of two runs are equal, bit for bit."""
    assert (run_folder / "latest").read_text() == (other / "latest").read_text()
    for name in ("model", "ema", "optimizer"):
        a = load_newest(run_folder, name)
        b = load_newest(other, name)
        assert a.keys() == b.keys()
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert not different, (name, different)


def assert_finite(tensors):
    assert all(t.float().isfinite().all() for t in tensors.values())


@pytest.fixture(scope="module")
def whole(photos_csv, tmp_path_factory):
    """A run of ten steps of the preset tiny."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--data", photos_csv, *SMALL, "--steps", 10, "--save_every", 4, "--out", "run"]
    call("train.py", *flags, cwd=folder)
    return folder / "run"


@pytest.fixture
def run_folder(whole, tmp_path):
    """A copy of it, elsewhere."""
    return shutil.copytree(whole, tmp_path / "run")


# --------------------------------------------------------------------------------------------------
# Settings.


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", {"model": "tiny", "steps": 4000, "lr": 5e-3, "out": "out/demo"}),
        ("--data CSV", {"steps": 12000, "resolution": 48, "out": "out/photos"}),
        ("--data CSV --lr 0.1 --steps 7", {"steps": 7, "lr": 0.1, "batch_size": 8}),
        ("--stage autoencoder", {"model": "mini", "clip": 1.0, "share_at_one": 0.3}),
        ("--model SANA", {"lr": 1e-5, "batch_size": 4, "share_at_one": 0.0, "clip": 0.1}),
        ("--model SANA --lora 4 --clip 9", {"lr": 1e-4, "clip": 9.0, "steps": 10000}),
        ("--model RUN --data CSV", {"lr": 5e-4, "steps": 12000}),  # a tenth: it is trained
        ("--model RUN --data CSV --lora 2", {"lr": 5e-3}),
        ("--curriculum 32:7,48:5", {"steps": 12, "resolution": 32}),
    ],
)
def test_what_was_typed_comes_first_then_defaults_of_the_model_then_common_ones(
    flags, expected, photos_csv, pipeline_folder, whole, monkeypatch
):
    """Of the words that are given to parse_args, not of those of this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "decoder", "--lr", "nonsense"])
    places = {"CSV": photos_csv, "SANA": pipeline_folder, "RUN": whole}
    words = [places.get(word, word) for word in ["--device", "cpu", *flags.split()]]
    args = parse(*words)
    assert vars(args).items() >= expected.items()
    names = {word.removeprefix("--") for word in words if str(word).startswith("--")}
    assert args.given.keys() >= names
    assert args.given.keys() <= names | {"model", "lora"}


def test_a_resumed_run_keeps_its_values_but_derives_some_anew(run_folder):
    """Those that depend on the machine, unless they were typed, now or when it was begun."""
    config = run_folder / "step_000010/config.json"
    content = json.loads(config.read_text())
    assert content["given"]["batch_size"] == content["args"]["batch_size"] == 2
    assert "lr" not in content["given"] and content["args"]["lr"] == 5e-3
    del content["given"]["device"]
    content["given"] |= {"workers": 3}
    content["args"] |= {"lr": 7e-3, "device": "cuda:9", "ema_device": "cuda:9", "accumulate": 2}
    content["args"] |= {"workers": 3, "proj_lr": 0.5}
    config.write_text(json.dumps(content))
    args = parse("--resume", run_folder, "--steps", 20, "--val_every", 5)
    assert (args.lr, args.steps, args.val_every, args.save_every) == (7e-3, 20, 5, 4)
    assert (args.device, args.ema_device) == (data.DEFAULTS["device"],) * 2
    assert (args.accumulate, args.workers) == (1, 3)
    assert args.proj_lr == train.projection_lr(7e-3, "restorer", None)
    assert parse("--resume", run_folder, "--accumulate", 2).accumulate == 2


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--resume RUN --stage autoencoder", "begun with restorer"),
        ("--resume RUN --conditioning projection", "begun with widen"),
        ("--resume RUN --lora 3", "begun with None"),
        ("--resume RUN --optimizer adamw_bf16", "begun with adamw"),
        ("--resume RUN --shift 1", "begun with 3"),
        ("--resume RUN --model mini", "where a pretrained model is"),
        ("--resume RUN --out x", "--resume names the folder already"),
        ("--resume RUN/step_000010x", "no such folder"),
        ("--out RUN", "holds a run already"),
        ("--curriculum 32:7,x", "invalid curriculum value: '32:7,x'"),
        ("--curriculum 32:7 --steps 9", "--steps: it has no effect with --curriculum"),
        ("--curriculum 32:7 --resolution 9", "--resolution: it has no effect with --curriculum"),
        ("--curriculum 32:7 --data CSV --cache x", "--cache: it has no effect with --curriculum"),
        ("--accumulate 3 --batch_size 4", "divisor"),
        ("--skip_bad", "give --data"),
        ("--val_data CSV", "give --data"),
        ("--overwrite", "unrecognized"),
        ("--device cuda:77", "not on this machine"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, said, photos_csv, whole):
    words = flags.replace("RUN", str(whole)).replace("CSV", str(photos_csv)).split()
    with pytest.raises(UserError, match=said):
        train.parse_args(words)


FLOW = ["conditioning", "lora", "optimizer", "shift", "share_at_one", "condition_dropout"]
FLOW += ["checkpointing", "cache"]
CONDITION = ["proj_lr", "caption_dropout", "degradations", "max_degradations"]


@pytest.mark.parametrize(
    "stage, idle",
    [
        ("autoencoder", [*FLOW, *CONDITION, "latent_steps"]),
        ("restorer", ["lpips_weights", "latent_steps"]),
        ("decoder", FLOW),
    ],
)
def test_flags_without_effect_are_refused(stage, idle):
    parser = train.make_parser()
    args = parse("--stage", stage, "--model", "mini", "--device", "cpu")
    args.data = "pairs.csv"
    for name in (action.dest for action in parser._actions if action.dest != "help"):
        args.given = {name: "anything"}
        if name in idle:
            with pytest.raises(UserError, match=f"--{name}: .*no effect with --stage {stage}"):
                train.check_flags(parser, args)
        else:
            train.check_flags(parser, args)


# --------------------------------------------------------------------------------------------------
# A run's folder and the pictures that it saw.


def test_seven_steps_and_three_are_ten(whole, photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL, "--steps", 10, "--save_every", 4]
    by = signal.SIGHUP  # the terminal was closed
    output = call("train.py", *flags, "--out", "run", cwd=tmp_path, stop=7, by=by)
    assert "stopped at step 7 of 10: python train.py --resume run goes on" in output
    assert "last validated at step 0 on 1 images" in output
    assert (tmp_path / "run/latest").read_text() == "step_000007"
    output = call("train.py", "--resume", "run", cwd=tmp_path)
    assert "3 steps of 2 crops of 32 pixels" in output
    assert_same_checkpoint(tmp_path / "run", whole)
    lines = [read_log(folder)[-1] for folder in (tmp_path / "run", whole)]
    assert lines[0] == lines[1]  # of the last validation
    already = refused("train.py", "--resume", "run", cwd=tmp_path)
    assert "at step 10 of 10 already" in already


def test_a_folder_is_claimed_by_making_it(photos_csv, tmp_path, monkeypatch):
    """By the first of two that begin in it. A start that fails leaves no trace."""
    flags = ["--data", photos_csv, *SMALL, "--steps", 2, "--out", "run"]
    load_batches = data.load_batches

    def second_start(*rest):
        monkeypatch.setattr(data, "load_batches", load_batches)
        assert "it exists already" in refused("train.py", *flags, cwd=tmp_path)
        return load_batches(*rest)

    monkeypatch.setattr(data, "load_batches", second_start)
    call("train.py", *flags, cwd=tmp_path)
    assert (tmp_path / "run/latest").read_text() == "step_000002"
    wrong = [*flags[:-1], "other", "--resolution", 33]
    assert "give a multiple of 4" in refused("train.py", *wrong, cwd=tmp_path)
    assert not (tmp_path / "other").exists()


REFUSED = {  # what a mount may refuse: (what to replace, the line or None)
    "rename": (Path, "rename", "cannot be renamed or removed here"),
    "remove": (os, "unlink", "cannot be renamed or removed here"),
    "replace": (os, "replace", "cannot write"),
    "chmod": (Path, "chmod", None),
    "change owner or times": (os, "utime", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_checkpoint_needs_is_tried_at_the_start(whole, photos_csv, tmp_path, name):
    """Before the first step, whose work would be lost; also where a run goes on."""
    shutil.copytree(whole, tmp_path / "run")
    place, function, says = REFUSED[name]
    flags = ["--data", photos_csv, *SMALL, "--steps", 1, "--out", "new"]
    with pytest.MonkeyPatch.context() as patch:

        def refuse(path, *_, **__):
            raise PermissionError(1, "Operation not permitted", str(path))

        patch.setattr(place, function, refuse)
        if not says:
            call("train.py", *flags, cwd=tmp_path)
            return
        patch.setattr(train, "train", None)
        for words in (flags, ["--resume", "run", "--steps", 99]):
            line = refused("train.py", *words, cwd=tmp_path)
            assert says in line and "Operation not permitted" in line
    assert (tmp_path / "run/latest").read_text() == "step_000010"


@pytest.mark.parametrize("function", ["chmod", "utime", "link"])
def test_what_a_run_stands_on_is_copied_without_more(whole, tmp_path, function):
    """A mount may refuse times and modes. Its parts have parts: a base, that of a LoRA."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(whole / "step_000010", tmp_path / "run/base")
    with pytest.MonkeyPatch.context() as patch:

        def refuse(path, *_, **__):
            raise PermissionError(1, "Operation not permitted", str(path))

        patch.setattr(os, function, refuse)
        model.link_checkpoint(tmp_path / "run/step_000010", tmp_path / "new")
    kept = ["config.json", "ema.safetensors", "rows.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["base", *kept]
    assert sorted(path.name for path in (tmp_path / "new/base").iterdir()) == kept


def test_what_a_killed_trial_of_the_folder_has_left_is_no_obstacle(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    train.vae.write_json(tmp_path / "run/.step_tried.partial/config.json", {})
    train.try_folder(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_a_score_that_small_pictures_lack_does_not_end_a_stopped_run(whole, tmp_path, monkeypatch):
    """It is null in the checkpoint, and a stop before the next validation reports it."""
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run/step_000010/config.json"
    saved = json.loads(path.read_text())
    saved["validation"] |= {"input_ssim": None, "restored_ssim": None}
    path.write_text(json.dumps(saved))
    output = call("train.py", "--resume", "run", "--steps", 99, cwd=tmp_path, stop=12)
    assert "last validated at step 10" in output and "SSIM nan -> nan" in output


def test_a_run_knows_whether_grey_stays_grey(photos, tmp_path):
    lines = ["image_path,condition_image_path,caption"]
    for i, path in enumerate(sorted(photos.glob("*.png"))):
        Image.open(path).convert("L").save(tmp_path / f"{i}.png")
        lines.append(f"{path},{i}.png,Colour it.")
    (tmp_path / "color.csv").write_text("\n".join(lines))
    (tmp_path / "grey.csv").write_text("image_path\n0.png\n1.png\n")
    for name, keeps_grey in (("color", False), ("grey", True)):
        table = ["--data", f"{name}.csv"]
        flags = [*SMALL, "--steps", 3, "--out", name]
        said = call("train.py", *table, *flags, cwd=tmp_path)
        assert ("12 of 12 grey conditions have a coloured" in said) != keeps_grey
        assert model.read_run(tmp_path / name)["model"]["keeps_grey"] == keeps_grey
        pipeline = evaluate.Pipeline.load(tmp_path / name)
        assert pipeline(tmp_path / "0.png").mode == ("L" if keeps_grey else "RGB")
        sample = Image.open(tmp_path / name / "samples/step_000003.png").convert("RGB")
        red, _, blue = sample.crop((104, 20, 190, 90)).split()  # the second: what was restored
        assert (red.tobytes() == blue.tobytes()) == keeps_grey
    call("train.py", *table, "--model", "color", *flags[:-1], "more", cwd=tmp_path)
    assert model.read_run(tmp_path / "more")["model"]["keeps_grey"]  # the last table says so


def test_resume_begins_where_no_run_is_yet(whole, photos_csv, tmp_path):
    """In no folder, and in what a start that was killed has left; not among other files."""
    flags = ["--data", photos_csv, *SMALL, "--steps", 10, "--save_every", 4, "--resume"]
    (tmp_path / "killed/samples").mkdir(parents=True)
    shutil.copy(whole / "config.json", tmp_path / "killed")
    shutil.copytree(whole / "step_000010", tmp_path / "killed/.step_000001.partial")
    for name in ("new", "killed"):
        call("train.py", *flags, "--out", name, cwd=tmp_path)
        assert_same_checkpoint(tmp_path / name, whole)
        assert not list((tmp_path / name).glob(".step*"))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("mine")
    line = refused("train.py", *flags, "--out", "letters", cwd=tmp_path)
    assert "it exists already" in line
    assert (tmp_path / "letters/dear.txt").read_text() == "mine"


def test_resume_before_the_first_checkpoint_begins_with_the_runs_own_flags(whole, tmp_path):
    (tmp_path / "killed").mkdir()
    assert "nothing was saved" in refused("train.py", "--resume", "killed", cwd=tmp_path)
    shutil.copy(whole / "config.json", tmp_path / "killed")
    output = call("train.py", "--resume", "killed", "--steps", 1, cwd=tmp_path)
    assert "1 steps of 2 crops of 32 pixels from 11 images" in output  # not the demo


def test_a_curriculum_may_be_made_longer(photos_csv, tmp_path):
    flags = ["--data", photos_csv, "--batch_size", 2, "--device", "cpu", "--out", "run"]
    call("train.py", *flags, "--curriculum", "32:2", cwd=tmp_path)
    call("train.py", "--resume", "run", "--curriculum", "32:2,48:1", cwd=tmp_path)
    assert model.read_run(tmp_path / "run")["step"] == 3


def test_validation_on_other_pictures_begins_best_anew(photos, tmp_path):
    """With nine rows none is held out, and eight are measured."""
    pictures = sorted(photos.glob("*.png"))
    for name, some in (("a", pictures[:9]), ("b", pictures[3:])):
        lines = ["image_path", *map(str, some)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    flags = ["--data", "a.csv", *SMALL, "--out", "run"]
    call("train.py", *flags, "--steps", 1, cwd=tmp_path)
    on = ["--resume", "run", "--steps"]
    assert "best begins anew" not in call("train.py", *on, 2, cwd=tmp_path)
    assert "best begins anew" in call("train.py", *on, 3, "--data", "b.csv", cwd=tmp_path)


def test_what_was_typed_at_the_start_does_not_hinder_what_is_typed_now(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    said = refused("train.py", "--resume", "run/step_000010", cwd=tmp_path)
    assert "give the run folder" in said
    call("train.py", "--resume", "run", "--curriculum", "32:11", cwd=tmp_path)  # --steps 10 before
    assert model.read_run(tmp_path / "run")["step"] == 11


def test_an_average_on_another_device_holds_the_last_weights(photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL, "--steps", 3, "--ema_device", "cpu:0", "--out", "run"]
    call("train.py", *flags, cwd=tmp_path)
    weights, averages = load_newest(tmp_path / "run"), load_newest(tmp_path / "run", "ema")
    assert all(torch.allclose(averages[name], weights[name], atol=1e-3) for name in weights)
    assert averages["sana.proj_out.weight"].abs().sum() > 0  # it began as 0


def test_a_stop_before_the_average_has_moved_says_so(photos_csv, tmp_path):
    flags = ["--data", photos_csv, *SMALL, "--steps", 60]
    for out, device, stop, said in (("a", "cpu:0", 2, True), ("b", "cpu", 2, False)):
        words = [*flags, "--ema_device", device, "--out", out]
        output = call("train.py", *words, cwd=tmp_path, stop=stop)
        assert ("what restores are the initial weights" in output) == said
    output = call("train.py", "--resume", "a", cwd=tmp_path, stop=51)
    assert "initial weights" not in output


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="1 GPUs for more processes"):
        train.start_processes(Namespace(device="cuda"))


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        data.use_device(name)
    assert chosen == ["cuda:1"]


def test_the_second_of_two_that_resume_one_run_stops(run_folder, tmp_path):
    flags = ["--resume", "run", "--save_every", 1, "--steps", 13]
    train_step = train.train_step
    with pytest.MonkeyPatch.context() as patch:

        def meanwhile(state, *rest):
            if state.step == 11:
                patch.setattr(train, "train_step", train_step)
                call("train.py", *flags, cwd=tmp_path)
            return train_step(state, *rest)

        patch.setattr(train, "train_step", meanwhile)
        line = refused("train.py", *flags, cwd=tmp_path)
    assert "another process trains here, it has saved step_000013" in line
    assert (run_folder / "latest").read_text() == "step_000013"
    model.load_restorer(run_folder)


def test_a_run_can_be_moved_and_a_step_folder_of_its_own_restores(run_folder, photo, tmp_path):
    small = photo.resize((40, 36))
    expected = evaluate.Pipeline.load(run_folder)(small).tobytes()
    (run_folder / "step_000010").rename(tmp_path / "step")
    assert evaluate.Pipeline.load(tmp_path / "step")(small).tobytes() == expected


@pytest.fixture
def table(photos, tmp_path):
    """Copies of the twelve photos, and photos.csv -> a function that writes it."""
    shutil.copytree(photos, tmp_path / "photos")

    def write(*rows):
        lines = ["image_path,caption", *rows]
        (tmp_path / "photos.csv").write_text("\n".join(lines) + "\n")

    write(*[f"photos/{i:02d}.png,a" for i in range(12)])
    return write


def test_rows_are_remembered_and_a_change_is_named(table, photos, tmp_path):
    flags = ["--data", "photos.csv", *SMALL, "--out", "run"]
    call("train.py", *flags, "--steps", 2, cwd=tmp_path)
    rows = json.loads((tmp_path / "run/step_000002/rows.json").read_text())
    assert (len(rows["trained"]), len(rows["held_out"]), rows["before"]) == (11, 1, [])
    held_out = rows["held_out"][0][0]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["held_out"] == [held_out]
    names = [f"photos/{i:02d}.png" for i in range(12)]
    assert [name for name, _, _ in rows["trained"]] == [n for n in names if n != held_out]
    for name, digest, _ in rows["trained"]:
        assert digest == file_digest(photos / name.removeprefix("photos/"))

    resume = "train.py", "--resume", "run", "--steps"
    trained = [name for name in names if name != held_out]
    table(*[f"{name},{'b' if name == trained[4] else 'a'}" for name in names])
    line = refused(*resume, 4, cwd=tmp_path)
    assert f"texts of the row {trained[4]} have changed" in line
    table(*[f"{name},a" for name in names if name != trained[2]])
    line = refused(*resume, 4, cwd=tmp_path)
    assert f"the row {trained[2]} was where {trained[3]} is now" in line

    call(*resume, 4, "--data", "photos.csv", cwd=tmp_path)
    call(*resume, 6, cwd=tmp_path)
    now = json.loads((tmp_path / "run/step_000006/rows.json").read_text())
    assert (now["held_out"], len(now["trained"])) == (rows["held_out"], 10)
    gone = [digest for name, digest, _ in rows["trained"] if name == trained[2]]
    assert now["before"] == gone  # it has seen this one, too

    (tmp_path / trained[0]).write_bytes(b"no longer a picture")
    assert "photos.csv, line" in refused(*resume, 8, cwd=tmp_path)


def test_what_the_model_was_trained_on_is_never_held_out(table, tmp_path):
    """Also by the run before the run before."""
    flags = ["--data", "photos.csv", *SMALL, "--steps", 1]
    call("train.py", *flags, "--out", "a", cwd=tmp_path)
    rows = json.loads((tmp_path / "a/step_000001/rows.json").read_text())
    held_out = rows["held_out"][0][0]
    names = [f"photos/{i:02d}.png" for i in range(12)]
    names.remove(held_out)
    table(*[f"{name},a" for name in names])  # a run of its own would hold out one of these
    for name, before in (("b", "a"), ("c", "b")):
        call("train.py", *flags, "--model", before, "--out", name, cwd=tmp_path)
        now = json.loads((tmp_path / name / "step_000001/rows.json").read_text())
        assert now["held_out"] == []
    table(*[f"{name},a" for name in [held_out, *names]])
    call("train.py", *flags, "--model", "c", "--out", "d", cwd=tmp_path)
    now = json.loads((tmp_path / "d/step_000001/rows.json").read_text())
    assert [name for name, _, _ in now["held_out"]] == [held_out]


# --------------------------------------------------------------------------------------------------
# The optimizer.


def test_split_weights_lose_nothing():
    """All exponents, ties between two bf16 neighbours, zeros, the largest, infinity."""
    limits = -(2**31), 2**31 - 1
    bits = torch.randint(*limits, (1_000_000,), generator=seeded(), dtype=torch.int64)
    ties = (bits >> 16 << 16) + 0x8000
    special = torch.tensor([0, -(2**31), 0x7F7FFFFF, 0x7F800000])
    weights = torch.cat([bits, ties, special]).to(torch.int32).view(torch.float32)
    weights = weights[~weights.isnan()]
    high, low = split_fp32(weights)
    assert torch.equal(join_fp32(high, low), weights)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    normal = weights.abs().clamp(max=3e38) == weights.abs()
    nearest = (weights.bfloat16().double() - weights.double()).abs()[normal]
    assert torch.equal((high.double() - weights.double()).abs()[normal], nearest)


def rounded(x, seed, start=0):
    return round_stochastically(x, *torch.tensor([seed, start], dtype=torch.int32))


def test_stochastic_rounding_has_the_mean_and_never_skips_a_neighbour():
    numbers = torch.tensor([1.0, 1.0 + 1 / 512, -1.0 - 3 / 512, 3e-5])
    x = numbers[:, None].expand(4, 40_000).contiguous()
    got = rounded(x.view(-1), 1).float().view(4, -1)
    assert (got[0] == 1).all()
    assert all(len(row.unique()) <= 2 for row in got)
    # in units of the gap between neighbours, at most; 1 / sqrt(40,000) = 0.005
    error = (got - x).mean(1) / (x.abs().mean(1) / 128)
    assert error.abs().max() < 0.015


def test_rounding_is_fair_and_unrelated_between_neighbours_and_seeds():
    """What is half way between two neighbours goes up or down like a coin.

    All correlations of 2^17 throws are below five standard deviations.
    """
    x = torch.full((1 << 17,), 1 + 1 / 256)
    seeds = torch.randint(-(2**31), 2**31, (8,), generator=seeded()).tolist()
    coins = torch.stack([(rounded(x, seed).float() > 1) * 2.0 - 1 for seed in seeds])
    rows = torch.cat([coins.roll(shift, 1) for shift in (0, 1, 2, 3, 64, 4096)])
    correlation = rows @ rows.T / x.numel() - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / x.numel() ** 0.5
    assert coins.mean(1).abs().max() < 5 / x.numel() ** 0.5


def test_rounding_depends_on_the_seed_and_the_place_alone():
    """So the processes that share a tensor round as one process would."""
    x = torch.randn(5000, generator=seeded())
    whole = rounded(x, 7)
    assert torch.equal(whole, torch.cat([rounded(x[:3000], 7), rounded(x[3000:], 7, 3000)]))
    assert not torch.equal(whole, rounded(x, 8))


def bf16_state(start, moments=torch.bfloat16):
    """Return what adamw_bf16 updates, for weights that begin as fp32 start."""
    high, low = split_fp32(start)
    zeros = torch.zeros_like(start, dtype=moments)
    return {
        "weight": high.clone(),
        "low": low,
        "exp_avg": zeros,
        "exp_avg_sq": zeros.clone(),
        "average": start.clone(),
    }


def bf16_step(state, gradient, t, lr, decay=0.0, share=0.0):
    numbers = 1 - lr * decay, -lr / (1 - 0.9**t), math.sqrt(1 - 0.99**t), 1.0, share
    adamw_bf16(
        state["weight"],
        state["low"],
        gradient,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["average"],
        *torch.tensor([t, 0], dtype=torch.int32),
        torch.tensor(numbers).unbind(),
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bf16_adamw_with_fp32_moments_is_torchs_adamw(decay, monkeypatch):
    """1,000 steps of changing length and direction, and their average.

    It is as far from torch's AdamW in fp64 as torch's in fp32, and from that one a unit or two in
    the last place, as are torch's own ways to compute it.
    """
    monkeypatch.setattr(train, "round_stochastically", lambda x, seed, start: x)
    start = torch.randn(20_001, generator=seeded())
    single = torch.nn.Parameter(start.clone())
    double = torch.nn.Parameter(start.double())
    average = start.clone()
    ours = bf16_state(start, torch.float32)
    options = {"betas": (0.9, 0.99), "weight_decay": decay, "foreach": False, "fused": False}
    adamw = torch.optim.AdamW([single, double], lr=1e-3, **options)
    for i in range(1000):
        size = 10 ** math.sin(i)
        gradient = (torch.randn(start.shape, generator=seeded(i + 1)) * size).bfloat16()
        single.grad = gradient.float()
        double.grad = gradient.double()
        adamw.param_groups[0]["lr"] = 1e-3 * (1 - i / 1000)
        adamw.step()
        bf16_step(ours, gradient, i + 1, 1e-3 * (1 - i / 1000), decay, 0.01)
        average.lerp_(single.detach(), 0.01)
    weight = join_fp32(ours["weight"], ours["low"])
    errors = [(t.double() - double.detach()).norm() for t in (weight, single.detach())]
    assert errors[0] <= 1.001 * errors[1]
    assert (weight - single.detach()).abs().max() < 1e-6
    assert (ours["exp_avg_sq"] / adamw.state[single]["exp_avg_sq"] - 1).abs().max() < 1e-6
    assert (ours["average"] - average).abs().max() < 1e-6


def make_state(optimizer, *flags):
    """A State of a toy SANA with a projection."""
    args = parse("--optimizer", optimizer, "--device", "cpu", "--steps", 40, *flags)
    restorer = model.Restorer(randomize(Sana(SANA)), "projection")
    return train.State(restorer.requires_grad_(True), args)


def fp32_weights(state):
    weights = {}
    for name, p in state.own.items():
        weights[name] = p.detach().float().clone()
        if p.dtype == torch.bfloat16:
            weights[name] = join_fp32(p.detach(), state.moments[name]["low"])
    return weights


@pytest.mark.parametrize("optimizer, every", [("adamw", 1), ("adamw_bf16", 1), ("adamw_bf16", 4)])
def test_updates_are_those_of_torchs_adamw_and_are_averaged(optimizer, every):
    """With two learning rates, a warm-up, a clipped gradient, and an average that warms up."""
    state = make_state(optimizer, "--lr", 1e-3, "--proj_lr", 1e-2, "--weight_decay", 0.1)
    state.average_every = every
    theirs = {name: torch.nn.Parameter(t.clone()) for name, t in fp32_weights(state).items()}
    average = {name: p.detach().clone() for name, p in theirs.items()}
    adamw = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.99), weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in theirs.items()}
    new = {"projection.weight"}
    for i in range(12):
        for n, (name, p) in enumerate(state.own.items()):
            gradient = torch.randn(p.shape, generator=seeded(100 * i + n)).bfloat16()
            p.grad = gradient.to(p.dtype)
            theirs[name].grad = gradient.float() * 0.5
        progress = (i + 0.5) / 40
        share = min(1, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))
        state.update(0.5)
        for peak, names in ((1e-3, theirs.keys() - new), (1e-2, new)):
            adamw.param_groups[0]["lr"] = share * peak
            adamw.param_groups[0]["params"] = [theirs[name] for name in names]
            adamw.step()
        decay = min(0.9999, (2 + i) / (11 + i)) ** every
        if (i + 1) % every == 0:
            for name, weight in fp32_weights(state).items():
                average[name] = average[name] * decay + weight * (1 - decay)
    for name, weight in fp32_weights(state).items():
        moved = (theirs[name].detach() - start[name]).norm()
        tolerance = 1e-4 if optimizer == "adamw" or name in new else 0.02  # moments in bf16
        assert (weight - theirs[name].detach()).norm() < tolerance * moved, name
        assert (state.average[name] - average[name]).norm() < 1e-4 * moved, name


def test_the_compiled_update_is_the_eager_one_bit_for_bit_in_few_graphs():
    """50 steps of a network with 17 shapes, a tensor of one number among them.

    It needs a C++ compiler, and fails without one.
    """
    torch._dynamo.reset()
    metrics.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    states = []
    for _ in range(2):
        state = make_state("adamw_bf16", "--weight_decay", 0.1, "--steps", 60)
        state.module.one = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        states.append(train.State(state.module, state.args))
    compiled, eager = states
    compiled.adamw_bf16 = train.compile_update("cpu")
    assert compiled.adamw_bf16 is not eager.adamw_bf16
    assert len({p.numel() for p in eager.own.values()}) >= 12
    for i in range(50):
        for state in states:
            for n, p in enumerate(state.own.values()):
                p.grad = torch.randn(p.shape, generator=seeded(100 * i + n)).to(p.dtype)
            state.update(0.5)
    for name, moments in eager.moments.items():
        assert torch.equal(compiled.own[name], eager.own[name]), name
        assert torch.equal(compiled.average[name], eager.average[name]), name
        for key, moment in moments.items():
            assert torch.equal(compiled.moments[name][key], moment), (key, name)
    assert 1 <= counters["unique_graphs"] <= 3
    # the graph of many numbers is one kernel: one launch a tensor
    assert metrics.generated_kernel_count <= counters["unique_graphs"]


@pytest.mark.parametrize("averaged, most", [(True, 30), (False, 22)])
def test_one_pass_moves_few_bytes_a_weight(averaged, most):
    """What the graph takes and what it writes, of one length, counted once each."""
    moved = []

    def count(graph, inputs):
        length = max(tensor.numel() for tensor in inputs if torch.is_tensor(tensor))
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if node.op == "placeholder" and torch.is_tensor(value) and value.dim():
                moved.append(value.element_size())
            if node.target == "copy_":
                moved.append(node.args[0].meta["example_value"].element_size())
        assert length == 64
        return graph

    torch._dynamo.reset()
    state = bf16_state(torch.randn(64, generator=seeded()))
    if not averaged:
        state["average"] = None
    with pytest.MonkeyPatch.context() as patch:
        update = torch.compile(train.adamw_bf16, backend=count, fullgraph=True)
        patch.setattr(sys.modules[__name__], "adamw_bf16", update)
        bf16_step(state, torch.ones(64).bfloat16(), 1, 1e-3)
    assert sum(moved) == (26 if averaged else 18) <= most


def test_without_a_compiler_the_update_is_eager_and_says_so(monkeypatch, capsys):
    def broken(function, **options):
        def call(*tensors):
            raise RuntimeError("Cannot find a working triton installation.\nMore.")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert train.compile_update("cpu") is train.adamw_bf16
    line = capsys.readouterr().out
    assert "compiled here (Cannot find a working triton installation.): its update takes" in line


def test_norms_are_summed_in_fp32_of_one_type_at_a_time(monkeypatch):
    """A GPU computes the norms of tensors of one type together."""
    state = make_state("adamw_bf16")
    for n, p in enumerate(state.own.values()):
        p.grad = torch.randn(p.shape, generator=seeded(n)).to(p.dtype)
    foreach_norm = torch._foreach_norm
    calls = []

    def watched(tensors, **options):
        calls.append({tensor.dtype for tensor in tensors})
        return foreach_norm(tensors, **options)

    monkeypatch.setattr(torch, "_foreach_norm", watched)
    norms = state.collect_gradients()
    assert calls == [{torch.bfloat16}, {torch.float32}]
    assert {norm.dtype for norm in norms} == {torch.float32}
    exact = sum(p.grad.double().square().sum() for p in state.own.values()) ** 0.5
    assert torch.stack(norms).norm().item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_update_is_compiled_for_blocks_of_full_size(monkeypatch):
    """Triton's pointwise kernels have 1,024 numbers a block, fewer if the first tensor is small."""
    lengths = []

    def compiled(function, **options):
        def call(weight, *others):
            lengths.append(weight.numel())

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    train.compile_update("cpu")
    assert lengths[0] // 128 >= 1024  # so many blocks are for all multiprocessors of a GPU


def test_a_run_on_the_cpu_leaves_the_gpu_alone(photos_csv, tmp_path, monkeypatch):
    """Asking a GPU for its statistics opens it, and takes some of its memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", None)
    flags = ["--data", photos_csv, *SMALL, "--steps", 1, "--device", "cpu", "--out", "run"]
    call("train.py", *flags, cwd=tmp_path)


def test_too_many_graphs_of_the_update_are_an_error():
    """Where torch would go on eager without a word."""
    torch._dynamo.reset()
    update = train.compile_update("cpu")
    state = bf16_state(torch.ones(16))
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(recompile_limit=1):
        patch.setattr(sys.modules[__name__], "adamw_bf16", update)
        with torch.no_grad():
            bf16_step(state, torch.ones(16).bfloat16(), 1, 1e-3)  # the graph that there is
            with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                bf16_step(state, torch.ones(16), 2, 1e-3)


# --------------------------------------------------------------------------------------------------
# Memory.


def test_checkpointing_changes_no_gradient():
    sana = randomize(Sana(SANA))
    g = seeded()
    latents = torch.randn(2, 8, 5, 4, generator=g)
    text = torch.randn(2, 6, 32, generator=g)
    gradients = []
    for sana.checkpointing in (False, True):
        sana.zero_grad()
        sana(latents, torch.tensor([100.0, 900.0]), text).square().sum().backward()
        gradients.append([p.grad.clone() for p in sana.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_parts_and_threads_that_share_a_batch_change_nothing(photos_csv, tmp_path):
    """Three threads have 3, 3 and 2 pictures. What they stopped goes on as if it had not been."""
    flags = ["--data", photos_csv, "--steps", 6, *SMALL, "--batch_size", 8]
    call("train.py", *flags, "--out", "one", cwd=tmp_path)
    parts = ["--accumulate", 2, "--checkpointing"]
    call("train.py", *flags, *parts, "--out", "parts", cwd=tmp_path)
    call("train.py", *flags, "--out", "three", cwd=tmp_path, threads=3)
    call("train.py", *flags, "--out", "again", cwd=tmp_path, threads=3, stop=3)
    call("train.py", "--resume", "again", cwd=tmp_path, threads=3)
    assert_same_checkpoint(tmp_path / "three", tmp_path / "again")
    one = load_newest(tmp_path / "one")
    for name in ("parts", "three"):
        other = load_newest(tmp_path / name)
        assert all((one[key] - other[key]).abs().max() < 1e-2 * one[key].abs().max() for key in one)
        assert any(not torch.equal(one[key], other[key]) for key in one)
        for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / name)):
            for key in a.keys() & {"loss", "norm"}:
                assert abs(a[key] / b[key] - 1) < 1e-3


def test_gradients_of_lanes_have_the_weights_layout():
    """As fused AdamW expects; those of a matrix product may be transposed."""
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=seeded()).T)
    x = torch.randn(8, 3, generator=seeded(1))
    config = model.PRESETS["tiny"]
    torch.set_num_threads(2)
    try:
        lanes = train.Lanes(config, parse("--device", "cpu"))
    finally:
        torch.set_num_threads(1)
    assert lanes.count == 2
    pieces = [slice(0, None, 2), slice(1, None, 2)]
    sums = lanes.add_gradients(lambda some: (x[some] @ weight.T).sum(1), [weight], pieces, 8)
    assert sum(sums).item() == pytest.approx((x @ weight.T).sum().item(), rel=1e-5)
    assert weight.grad.stride() == weight.stride() == (1, 4)
    assert torch.allclose(weight.grad, x.mean(0).expand(4, 3))


def test_a_run_keeps_its_shift(photos_csv, tmp_path):
    """One that begins with it has it, too, but for a flag."""
    flags = ["--data", photos_csv, *SMALL, "--steps", 1]
    call("train.py", *flags, "--shift", 0.1, "--out", "first", cwd=tmp_path)
    call("train.py", *flags, "--model", "first", "--out", "kept", cwd=tmp_path)
    assert model.load_restorer(tmp_path / "kept")[0].shift == 0.1
    first = str(tmp_path / "first")
    config = model.describe_model(first, "restorer", shift=1)
    assert model.initial_restorer(first, config, None).shift == 1  # what it is trained with


@pytest.mark.parametrize("lora", [False, True])
def test_training_in_bf16_resumes_bit_for_bit(whole, photos_csv, tmp_path, lora):
    """And keeps eight bytes a weight: bf16, its low bits, two moments."""
    flags = ["--data", photos_csv, *SMALL, "--steps", 10, "--optimizer", "adamw_bf16"]
    if lora:
        flags += ["--model", whole, "--lora", 2]
    else:
        flags += ["--conditioning", "projection"]
    call("train.py", *flags, "--out", "whole", cwd=tmp_path)
    call("train.py", *flags, "--out", "halved", cwd=tmp_path, stop=7)
    assert (tmp_path / "halved/latest").read_text() == "step_000007"
    call("train.py", "--resume", "--out", "halved", cwd=tmp_path)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halved")

    weights = load_newest(tmp_path / "whole")
    half = {name for name, t in weights.items() if t.dtype == torch.bfloat16}
    assert set(weights) - half == (set() if lora else {"projection.weight"})
    size = sum(weights[name].nbytes for name in half)
    for key, moment in load_newest(tmp_path / "whole", "optimizer").items():
        if key.split(".", 1)[1] in half:
            size += moment.nbytes
    assert size == 8 * sum(weights[name].numel() for name in half)


# --------------------------------------------------------------------------------------------------
# The loop.


def spoil_losses(monkeypatch, steps):
    """Make the loss of these steps of training nan, counted from 1."""
    flow_loss = train.model.flow_loss
    train_step = train.train_step
    begun = []

    def watched(state, *rest):
        begun.append(state.step + 1)
        return train_step(state, *rest)

    def spoilt(*inputs, **options):
        loss = flow_loss(*inputs, **options)
        in_training = torch.is_grad_enabled()  # not in validation
        return loss * math.nan if in_training and begun[-1] in steps else loss

    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train.model, "flow_loss", spoilt)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_bf16"])
def test_steps_without_a_finite_loss_are_skipped_and_do_not_change_how_a_run_resumes(
    optimizer, photos_csv, tmp_path, monkeypatch
):
    """Steps 1 to 3 and 7 have no finite loss.

    A run that stopped after 3, before any update, or after 8, ends like the one that did not.
    """
    spoil_losses(monkeypatch, {1, 2, 3, 7})
    flags = ["--data", photos_csv, *SMALL, "--steps", 10, "--optimizer", optimizer]
    output = call("train.py", *flags, "--out", "whole", cwd=tmp_path)
    assert output.count("skipped") == 4
    assert "step 3: loss nan" in output
    assert read_log(tmp_path / "whole")[-2]["skipped"] == 4
    assert_finite(load_newest(tmp_path / "whole"))
    for stop in (3, 8):
        name = f"stopped_{stop}"
        call("train.py", *flags, "--out", name, cwd=tmp_path, stop=stop)
        assert (tmp_path / name / "latest").read_text() == f"step_{stop:06d}"
        call("train.py", "--resume", name, cwd=tmp_path)
        assert_same_checkpoint(tmp_path / "whole", tmp_path / name)


def test_twenty_steps_without_a_finite_loss_end_the_run(photos_csv, tmp_path, monkeypatch):
    spoil_losses(monkeypatch, range(5, 100))
    flags = ["--data", photos_csv, *SMALL, "--steps", 60, "--save_every", 100, "--out", "run"]
    assert "20 steps in a row" in refused("train.py", *flags, cwd=tmp_path)
    assert_finite(load_file(tmp_path / "run/step_000024/model.safetensors"))


def test_condition_dropout_hides_that_share_of_the_conditions(photos_csv, tmp_path, monkeypatch):
    flow_loss = train.model.flow_loss
    hidden = []

    def watch(restorer, x0, condition, *rest, **options):
        if torch.is_grad_enabled():  # not in validation
            hidden.extend((condition == 0).flatten(1).all(1).tolist())
        return flow_loss(restorer, x0, condition, *rest, **options)

    monkeypatch.setattr(train.model, "flow_loss", watch)
    flags = ["--data", photos_csv, *SMALL, "--batch_size", 8, "--condition_dropout", 0.3]
    call("train.py", *flags, "--steps", 4, "--out", "run", cwd=tmp_path)
    args = parse(*flags)
    expected = [train.draw_step([48, 8, 8], step, args, 3.0)[2] for step in range(4)]
    assert hidden == [not kept for kept in torch.cat(expected).tolist()]
    args.batch_size = 2000
    dropped = 1 - train.draw_step([1], 0, args, 3.0)[2].float().mean().item()
    assert abs(dropped - 0.3) < 0.04  # four standard deviations


def test_another_batch_size_after_a_resume_skips_and_repeats_no_draw(
    photos_csv, tmp_path, monkeypatch
):
    prepare = data.PairedDataset.prepare
    drawn = []

    def watch(dataset, n, plan):
        if dataset.training:
            drawn.append(n)
        return prepare(dataset, n, plan)

    flags = ["--data", photos_csv, "--curriculum", "32:4,48:4", "--out", "run", "--device", "cpu"]
    call("train.py", *flags, "--batch_size", 4, cwd=tmp_path, stop=3)
    monkeypatch.setattr(data.PairedDataset, "prepare", watch)
    call("train.py", "--resume", "run", "--batch_size", 2, cwd=tmp_path)
    assert sorted(drawn) == list(range(12, 22))
    assert model.read_run(tmp_path / "run")["drawn"] == 22


def test_a_curriculum_changes_the_crop_and_resumes_across_the_change(
    photos_csv, tmp_path, monkeypatch
):
    flow_loss = train.model.flow_loss
    sides = []

    def watch(restorer, x0, *rest, **options):
        if torch.is_grad_enabled():
            sides.append(x0.shape[-1] * 4)
        return flow_loss(restorer, x0, *rest, **options)

    monkeypatch.setattr(train.model, "flow_loss", watch)
    flags = ["--data", photos_csv, "--curriculum", "32:4,48:3", "--batch_size", 2]
    flags += ["--val_every", 50, "--device", "cpu"]
    call("train.py", *flags, "--out", "whole", cwd=tmp_path)
    assert sides == [32] * 4 + [48] * 3
    for stop, workers in ((2, 2), (5, 1)):
        out = tmp_path / f"stopped_{stop}"
        call("train.py", *flags, "--out", out, cwd=tmp_path, stop=stop)
        call("train.py", "--resume", out, "--workers", workers, cwd=tmp_path)
        assert_same_checkpoint(tmp_path / "whole", out)


def test_the_best_checkpoint_is_one_that_was_validated(photos_csv, tmp_path, monkeypatch):
    """9 dB at step 4, 1 dB at step 8, saved at every step."""

    def validate(state, *_):
        numbers = {"input_psnr": 5.0, "input_ssim": 0.5, "restored_ssim": 0.5}
        psnr = 9.0 if state.step == 4 else 1.0
        return {"step": state.step, "restored_psnr": psnr} | numbers

    monkeypatch.setattr(train, "validate", validate)
    flags = ["--data", photos_csv, *SMALL, "--steps", 8, "--val_every", 4, "--save_every", 1]
    call("train.py", *flags, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run/best").read_text() == "step_000004"
    assert (tmp_path / "run/step_000004").is_dir()
