"""A pipeline folder that diffusers wrote, and what is made of it.

The same images as diffusers makes, loading and its errors, the hub, export, and the two commands
that train and restore with it.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from degrade import UserError
from model import SAMPLERS, Gemma2, GemmaTokenizer, Restorer, Sana, encode_prompts, guided
from model import load_restorer, pad_text
from test_commands import run
from vae import DCAE, load_pretrained, needed_files

WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAIN = ["--resolution", 32, "--batch_size", 2, "--steps", 2]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write_pairs(photos, folder):
    """Write a CSV of the twelve photos, of which every second one has a caption."""
    lines = ["image_path,condition_image_path,caption"]
    for i in range(12):
        caption = "a picture" if i % 2 else ""
        lines.append(f"{photos / f'{i:02d}.png'},,{caption}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --------------------------------------------------------------------------------------------------
# Text to image, as a whole.


def sample_as_diffusers(pipeline, sampler, steps, noise, guidance, prompt):
    """Return the latents of its pipeline."""
    options = {"num_inference_steps": steps}
    if sampler == "euler":
        options = {"sigmas": np.linspace(1, 0, steps + 1)[:-1].tolist()}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        height=64,
        width=96,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
        use_resolution_binning=False,
        **options,
    ).images


@pytest.mark.parametrize("sampler", ["euler", "dpm"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_pipeline_makes_the_latents_that_diffusers_makes(
    pipeline, pipeline_folder, monkeypatch, sampler, guidance
):
    tokenizer = GemmaTokenizer(pipeline_folder / "tokenizer")
    gemma = load_pretrained(Gemma2, pipeline_folder / "text_encoder")
    sana = load_pretrained(Sana, pipeline_folder / "transformer")
    text, nothing = encode_prompts(tokenizer, gemma, ["a small red cat", ""])
    prompt, empty = pad_text([text]), pad_text([nothing])
    noise = torch.randn(1, 8, 16, 24, generator=seeded())
    velocity = guided(Restorer(sana, "none"), None, prompt, empty, guidance)
    if sampler == "euler":
        monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    for steps in (1, 2, 20):
        peer = sample_as_diffusers(pipeline, sampler, steps, noise, guidance, "a small red cat")
        got = SAMPLERS[sampler](velocity, noise, steps)
        assert (got - peer).abs().max() <= 1e-4 * peer.abs().max(), steps

    # the projection, at step 0, is not there
    restorer = Restorer(sana, "projection")
    velocity = guided(restorer, noise.flip(1), prompt, empty, guidance)
    assert torch.equal(SAMPLERS[sampler](velocity, noise, 20), got)


def test_decoded_pictures_are_the_pipelines(pipeline, pipeline_folder):
    latents = torch.randn(1, 8, 5, 6, generator=seeded(1))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    got = load_pretrained(DCAE, pipeline_folder / "vae").requires_grad_(False).decode(latents)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# --------------------------------------------------------------------------------------------------
# Loading.


def assert_same_tensors(got, expected):
    """Both are networks; the second one's weights may have more digits."""
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_shards_load_as_the_single_file_does(pipeline, pipeline_folder, tmp_path):
    pipeline.transformer.save_pretrained(tmp_path / "sana", max_shard_size="50KB")
    pipeline.text_encoder.save_pretrained(tmp_path / "gemma", max_shard_size="60KB")
    for network, part, shards in ((Sana, "transformer", "sana"), (Gemma2, "text_encoder", "gemma")):
        assert len(list((tmp_path / shards).glob("*.safetensors"))) > 1
        whole = load_pretrained(network, pipeline_folder / part)
        assert_same_tensors(load_pretrained(network, tmp_path / shards), whole)


def test_of_two_variants_bf16_is_loaded(pipeline, pipeline_folder, tmp_path):
    whole = load_pretrained(Sana, pipeline_folder / "transformer")
    half = SanaTransformer2DModel.from_pretrained(
        pipeline_folder / "transformer", torch_dtype=torch.bfloat16
    )
    pipeline.transformer.save_pretrained(tmp_path / "both")
    half.save_pretrained(tmp_path / "both", variant="bf16")
    half.save_pretrained(tmp_path / "shards", variant="bf16", max_shard_size="30KB")
    for folder in ("both", "shards"):
        loaded = load_pretrained(Sana, tmp_path / folder)
        assert loaded.proj_out.weight.dtype == torch.bfloat16
        assert_same_tensors(loaded, whole)
    for tensor in load_pretrained(Sana, tmp_path / "both", torch.float32).parameters():
        assert tensor.dtype == torch.float32


@pytest.fixture
def sana_folder(pipeline_folder, tmp_path):
    """A transformer/ folder to damage."""
    return shutil.copytree(pipeline_folder / "transformer", tmp_path / "deep/er/transformer")


def assert_refused(folder, *words, network=Sana):
    with pytest.raises(UserError) as error:
        load_pretrained(network, folder)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_config_that_does_not_fit_is_named(sana_folder):
    path = sana_folder / "config.json"
    original = path.read_text()
    assert_refused(sana_folder, "SanaTransformer2DModel", "AutoencoderDC", network=DCAE)
    for change, *words in (
        ({"_class_name": "Flux"}, "config.json", "Flux", "SanaTransformer2DModel"),
        ({"num_layers": "two"}, "config.json", "SanaTransformer2DModel"),
        ({"guidance_embeds": True}, "config.json", "guidance_embeds"),
    ):
        path.write_text(original)
        edit_json(path, **change)
        assert_refused(sana_folder, *words)
    path.write_text("{")
    assert_refused(sana_folder, "config.json")
    path.unlink()
    assert_refused(sana_folder, "config.json")


def test_weights_that_do_not_fit_are_named(sana_folder):
    path = sana_folder / WEIGHTS
    tensors = load_file(path)
    bias = tensors["proj_out.bias"]
    for changed, *words in (
        ({"extra.weight": torch.zeros(1)}, "unexpected", "extra.weight"),
        ({"proj_out.bias": torch.zeros(9)}, "proj_out.bias", "[9]", "[8]"),
        ({"proj_out.bias": bias.int()}, "proj_out.bias", "int32"),
        ({"proj_out.bias": bias / 0}, "proj_out.bias", "not finite"),
    ):
        save_file(tensors | changed, path)
        assert_refused(sana_folder, WEIGHTS, *words)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    assert_refused(sana_folder, WEIGHTS, "missing", "proj_out.bias")


def test_damaged_weight_files_are_named(pipeline, sana_folder):
    path = sana_folder / WEIGHTS
    for content in (path.read_bytes()[:-1000], b"\x10\0\0\0\0\0\0\0garbage, no header", b""):
        path.write_bytes(content)
        assert_refused(sana_folder, WEIGHTS)
    path.unlink()
    assert_refused(sana_folder, f"no {WEIGHTS}")
    pipeline.transformer.save_pretrained(sana_folder, max_shard_size="50KB")
    sorted(sana_folder.glob("*.safetensors"))[1].unlink()
    assert_refused(sana_folder, "00002-of-")
    for content in ("{}", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}'):
        (sana_folder / f"{WEIGHTS}.index.json").write_text(content)
        assert_refused(sana_folder, f"{WEIGHTS}.index.json")


def test_an_index_reads_no_file_outside_its_folder(sana_folder):
    secret = sana_folder.parent.parent / "secret.safetensors"
    shutil.copy(sana_folder / WEIGHTS, secret)
    assert (sana_folder / "../../secret.safetensors").is_file()
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (sana_folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert_refused(sana_folder, str(sana_folder / "secret.safetensors"), "no such file")


# --------------------------------------------------------------------------------------------------
# The hub.

SHA = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/Toy_SANA_diffusers"


class Hub(BaseHTTPRequestHandler):
    """Of the hub's endpoints those that a download uses. server.folder is the repository."""

    def do_HEAD(self):
        path = self.path.split("?")[0]
        file = self.server.folder / path.removeprefix(f"/{REPOSITORY}/resolve/{SHA}/")
        if path.startswith(f"/api/models/{REPOSITORY}"):
            self.send(json.dumps(self.describe("/tree/" in path)).encode(), {})
        elif file.is_file():
            etag = hashlib.sha1(str(file).encode()).hexdigest()
            self.send(file.read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})
        else:
            reason = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.send(b"{}", reason, 404)

    do_GET = do_HEAD

    def describe(self, tree):
        """Return what the hub's API says of the repository, or of each of its files."""
        entries = []
        for file in self.server.folder.rglob("*.*"):
            name = file.relative_to(self.server.folder).as_posix()
            size = file.stat().st_size
            entry = {"type": "file", "path": name, "rfilename": name, "size": size, "oid": SHA}
            entries.append(entry)
        return entries if tree else {"id": REPOSITORY, "sha": SHA, "siblings": entries}

    def send(self, body, headers, status=200):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def use_hub(monkeypatch, endpoint, cache):
    """Make endpoint the hub of the commands that the test runs."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")


def test_a_model_is_downloaded_once_and_then_needs_no_network(
    pipeline_folder, photos, tmp_path, monkeypatch
):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = pipeline_folder
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    flags = "train.py", "--data", write_pairs(photos, tmp_path), *TRAIN, "--model"
    line = run(*flags, "someone/Absent", cwd=tmp_path, status=2)
    assert "someone/Absent" in line and "repository not found" in line.lower()
    run(*flags, REPOSITORY, "--out", "online", cwd=tmp_path)
    found = (tmp_path / "cache").rglob(f"snapshots/{SHA}/*/*")
    assert {f"{file.parent.name}/{file.name}" for file in found} == {
        "transformer/config.json",
        f"transformer/{WEIGHTS}",
        "vae/config.json",
        f"vae/{WEIGHTS}",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    }
    server.shutdown()
    server.server_close()
    restore = "evaluate.py", "--checkpoint", "online", "--input", photos / "03.png", "--steps", 1
    run(*restore, "--output", "a.png", cwd=tmp_path)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_nothing_cached_and_no_network_is_one_line(photos, tmp_path, monkeypatch, offline):
    """Nobody listens at port 9; HF_HUB_OFFLINE tells the hub's client not to try."""
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    flags = "--data", write_pairs(photos, tmp_path), "--model", "sana1.5-1.6b", *TRAIN
    start = time.monotonic()
    line = run("train.py", *flags, cwd=tmp_path, status=2)
    assert time.monotonic() - start < 30
    assert line.startswith("error: --model sana1.5-1.6b: ")
    assert "not in the cache" in line
    assert "give its folder" in line
    assert "--model tiny" in line
    assert ("HF_HUB_OFFLINE" in line) == (offline == "1")
    assert os.listdir(tmp_path) == ["pairs.csv"]


def test_of_a_repository_only_what_is_needed_is_fetched():
    index = "diffusion_pytorch_model.safetensors.index"
    needed = {
        "transformer/config.json",
        "vae/config.json",
        f"vae/{WEIGHTS}",
        "tokenizer/tokenizer.json",
    }
    transformer = {
        f"transformer/{index}.bf16.json",
        "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
    }
    others = {
        "README.md",
        "model_index.json",
        f"transformer/{index}.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "tokenizer/tokenizer.model",
    }
    names = sorted(needed | transformer | others)
    assert set(needed_files(names)) == needed | transformer
    assert set(needed_files(names, ["vae", "text_encoder"])) == needed


# --------------------------------------------------------------------------------------------------
# From a folder to a restorer.


@pytest.fixture
def base(pipeline_folder, tmp_path):
    """The folder "base", to train from with --model base."""
    return shutil.copytree(pipeline_folder, tmp_path / "base")


def assert_exported_computes_the_same(exported, restorer):
    theirs = SanaTransformer2DModel.from_pretrained(exported).eval()
    assert theirs.config.in_channels == 16
    assert theirs.config.out_channels == 8
    generator = seeded()
    latents = torch.randn(2, 8, 6, 5, generator=generator)
    condition = torch.randn(2, 8, 6, 5, generator=generator)
    text = torch.randn(2, 7, 32, generator=generator)
    timestep = torch.tensor([10.0, 700.0])
    mask = torch.arange(7) < torch.tensor([7, 3])[:, None]
    both = torch.cat([latents, condition], 1)
    with torch.no_grad():
        got = restorer(latents, condition, timestep, text, mask)
        peer = theirs(both, text, timestep, encoder_attention_mask=mask.float()).sample
    assert (got - peer).abs().max() <= 1e-5 * peer.abs().max()


@pytest.mark.parametrize("conditioning", ["projection", "widen"])
def test_train_restore_and_export_from_a_folder(base, photos, tmp_path, conditioning):
    data = write_pairs(photos, tmp_path)
    flags = "--data", data, "--model", "base", *TRAIN
    more = "--conditioning", conditioning, "--lr", "1e-3", "--shift", 2, "--out", "run"
    run("train.py", *flags, *more, cwd=tmp_path)
    assert (tmp_path / "run/samples/step_000002.png").is_file()
    restore = "evaluate.py", "--checkpoint", "run"
    words = "--input", photos / "03.png", "--output", "r.png", "--steps", 2, "--sampler", "dpm"
    run(*restore, *words, "--prompt", "Remove noise.", cwd=tmp_path)
    assert Image.open(tmp_path / "r.png").size == (96, 80)

    said = run("model.py", "export", "run", "exported", cwd=tmp_path)
    assert "it predicts noise - x0; sample with shift 2" in said
    restorer, config = load_restorer(tmp_path / "run")
    assert config["name"] == str(base.resolve())
    assert config["conditioning"] == conditioning
    if conditioning == "projection":
        assert restorer.projection.weight[:, 8:].abs().max() > 1e-4  # it has moved
    assert_exported_computes_the_same(tmp_path / "exported", restorer)

    # what was exported is no text-to-image model to begin from
    shutil.rmtree(base / "transformer")
    shutil.copytree(tmp_path / "exported", base / "transformer")
    refused = run("train.py", *flags, "--out", "further", cwd=tmp_path, status=2)
    assert "takes 16 channels and gives 8" in refused


def test_a_pretrained_model_may_move(base, photos, tmp_path):
    """Other weights in its place are refused: test_lora."""
    data = write_pairs(photos, tmp_path)
    run("train.py", "--data", data, "--model", "base", *TRAIN, "--out", "run", cwd=tmp_path)
    shutil.rmtree(base / "transformer")  # the run has it
    (tmp_path / "deep").mkdir()
    base.rename(tmp_path / "deep/moved")
    resume = "train.py", "--resume", "run", "--steps", 3
    assert str(base) in run(*resume, cwd=tmp_path, status=2)
    restore = "evaluate.py", "--checkpoint", "../run", "--input", photos / "03.png", "--steps", 1
    assert str(base) in run(*restore, "--output", "a.png", cwd=tmp_path / "deep", status=2)
    run(*restore, "--output", "a.png", "--model", "moved", cwd=tmp_path / "deep")
    run(*resume, "--model", "deep/moved", cwd=tmp_path)
    run(*restore, "--output", "b.png", cwd=tmp_path / "deep")  # now it knows the place


@pytest.mark.parametrize(
    "part, change, flags, words",
    [
        ("transformer", {"caption_channels": 31}, [], ["text_encoder gives 32", "takes 31"]),
        ("vae", {"latent_channels": 16}, [], [WEIGHTS, "decoder.conv_in.weight"]),
        ("vae", {}, ["--resolution", "30"], ["--resolution 30", "multiple of 4"]),
    ],
)
def test_bad_pretrained_folders_get_one_line(base, photos, tmp_path, part, change, flags, words):
    edit_json(base / part / "config.json", **change)
    begin = "train.py", "--data", write_pairs(photos, tmp_path), "--model", "base"
    line = run(*begin, "--resolution", "32", *flags, cwd=tmp_path, status=2)
    for word in words:
        assert word in line
    assert not (tmp_path / "out/pairs").exists()
