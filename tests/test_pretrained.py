"""A pipeline folder that diffusers wrote: the same images from it as diffusers makes, loading and its errors, the hub, export,
and the two commands that train and restore with it."""
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import ROOT
from degrade import UserError
from model import GemmaTokenizer, Gemma2, Restorer, Sana, encode_prompts, guided, load_restorer, pad_text, sample
from pipeline import SANA
from test_commands import run
from vae import DCAE, find_model, needed_files

TRAIN = ["--resolution", "32", "--batch_size", "2", "--val_every", "2", "--save_every", "2", "--steps", "4"]


# Text to image, as a whole.

@pytest.mark.parametrize("sampler", ["euler", "dpm"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_pipeline_makes_the_latents_that_diffusers_makes(pipeline, pipeline_folder, sampler, guidance):
    sana = Sana.from_pretrained(pipeline_folder / "transformer")
    prompts = ["a small red cat", ""]
    rows = encode_prompts(GemmaTokenizer(pipeline_folder / "tokenizer"), Gemma2.from_pretrained(pipeline_folder / "text_encoder"), prompts)
    prompt, empty = (pad_text([row]) for row in rows)
    noise = torch.randn(1, 8, 16, 24, generator=torch.Generator().manual_seed(0))
    own, pipeline.scheduler = pipeline.scheduler, (FlowMatchEulerDiscreteScheduler(shift=3.0) if sampler == "euler" else pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 2, 20):
        options = {"sigmas": np.linspace(1, 0, steps + 1)[:-1].tolist()} if sampler == "euler" else {"num_inference_steps": steps}
        expected = pipeline(prompts[0], height=64, width=96, guidance_scale=guidance, latents=noise, output_type="latent",
                            use_resolution_binning=False, **options).images
        got = sample(guided(sana, prompt, empty, guidance), noise, steps, sampler)
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), steps
    pipeline.scheduler = own
    restorer = Restorer(sana, "projection")
    again = sample(guided(lambda x, *rest: restorer(x, noise.flip(1), *rest), prompt, empty, guidance), noise, 20, sampler)
    assert torch.equal(again, got)  # the projection, at step 0, is not there


def test_decoded_pictures_are_the_pipelines(pipeline, pipeline_folder):
    latents = torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    got = DCAE.from_pretrained(pipeline_folder / "vae").decode(latents)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# Loading.

def test_shards_and_variants_load_as_the_single_file_does(pipeline, pipeline_folder, tmp_path):
    whole = Sana.from_pretrained(pipeline_folder / "transformer").state_dict()
    pipeline.transformer.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    pipeline.transformer.save_pretrained(tmp_path / "both")
    half = SanaTransformer2DModel.from_pretrained(pipeline_folder / "transformer", torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "both", variant="bf16")
    half.save_pretrained(tmp_path / "sharded", variant="bf16", max_shard_size="30KB")
    pipeline.text_encoder.save_pretrained(tmp_path / "gemma", max_shard_size="60KB")
    shards = Sana.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    for folder in ("both", "sharded"):  # bf16 wins
        assert all(torch.equal(whole[name].bfloat16(), t) for name, t in Sana.from_pretrained(tmp_path / folder).state_dict().items())
    assert all(t.dtype == torch.float32 for t in Sana.from_pretrained(tmp_path / "both", torch.float32).parameters())
    one, several = (Gemma2.from_pretrained(f).state_dict() for f in (pipeline_folder / "text_encoder", tmp_path / "gemma"))
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_what_does_not_fit_is_named(pipeline, pipeline_folder, tmp_path):
    def refused(change, *words, cls=Sana, part="transformer"):
        folder = tmp_path / "f"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pipeline_folder / part, folder)
        change(folder)
        with pytest.raises(UserError) as error:
            cls.from_pretrained(folder)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value

    def edit(**changes):
        return lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))

    def rewrite(change):
        def apply(folder):
            path = next(folder.glob("*.safetensors"))
            save_file(change(load_file(path)), path)
        return apply
    refused(lambda f: (f / "config.json").unlink(), "config.json")
    refused(lambda f: (f / "config.json").write_text("{"), "config.json")
    refused(edit(_class_name="FluxTransformer2DModel"), "config.json", "FluxTransformer2DModel", "SanaTransformer2DModel")
    refused(lambda f: None, "SanaTransformer2DModel", "AutoencoderDC", cls=DCAE)
    refused(edit(num_layers="two"), "config.json", "SanaTransformer2DModel")
    refused(edit(guidance_embeds=True), "guidance_embeds")
    refused(lambda f: next(f.glob("*.safetensors")).unlink(), "no diffusion_pytorch_model.safetensors")
    refused(rewrite(lambda t: {k: v for k, v in t.items() if k != "proj_out.bias"}), "missing", "proj_out.bias")
    refused(rewrite(lambda t: t | {"extra.weight": torch.zeros(1)}), "unexpected", "extra.weight")
    refused(rewrite(lambda t: t | {"proj_out.bias": torch.zeros(9)}), "proj_out.bias", "[9]", "[8]")
    path = "diffusion_pytorch_model.safetensors"
    refused(lambda f: (f / path).write_bytes((f / path).read_bytes()[:-1000]), path)
    refused(lambda f: (f / path).write_bytes(b"\x10\0\0\0\0\0\0\0garbage, no header"), path)

    def shards(folder):
        pipeline.transformer.save_pretrained(folder, max_shard_size="50KB")
        (folder / path).unlink()
        sorted(folder.glob("*.safetensors"))[1].unlink()
    refused(shards, "00002-of-")
    refused(lambda f: (f / f"{path}.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}'), "index.json", "outside")


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    """290 MB of random weights, every byte of them read: at most 1.15 times the file, and no second copy."""
    config = SANA | {"num_attention_heads": 32, "attention_head_dim": 32, "num_layers": 4, "cross_attention_dim": 1024, "cross_attention_head_dim": 512}
    SanaTransformer2DModel(**config).save_pretrained(tmp_path)
    script = """if 1:
        import re, sys, torch
        sys.path.insert(0, sys.argv[1])
        from model import Sana
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # kB
        before = peak()
        sana = Sana.from_pretrained(sys.argv[2])
        assert all(p.amax().isfinite() for p in sana.parameters())
        print(peak() - before)"""
    output = subprocess.run([sys.executable, "-c", script, ROOT, tmp_path], capture_output=True, text=True, check=True).stdout
    size = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size / 1024
    assert size > 200_000 and 0.9 * size < int(output) < 1.15 * size


# The hub, on loopback.

SHA, REPOSITORY = "0123456789abcdef0123456789abcdef01234567", "someone/Toy_SANA_diffusers"


class Hub(BaseHTTPRequestHandler):
    """Of the hub's endpoints those that a download uses. The first answer for a weight file breaks off in the middle."""
    protocol_version = "HTTP/1.1"

    def answer(self, body=b"", status=200, send=True, headers=()):
        self.send_response(status)
        for name, value in (("Content-Length", len(body)), *headers):
            self.send_header(name, str(value))
        self.end_headers()
        if send:
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET(send=False)

    def do_GET(self, send=True):
        path = self.path.split("?")[0]
        files = {p.relative_to(self.server.folder).as_posix(): p for p in self.server.folder.rglob("*") if p.is_file()}
        if path == "/":
            return self.answer(send=send)
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            return self.answer(json.dumps([{"type": "file", "path": n, "size": p.stat().st_size, "oid": f"{abs(hash(n)):040x}"[:40]} for n, p in files.items()]).encode())
        if path.startswith(f"/api/models/{REPOSITORY}"):
            return self.answer(json.dumps({"id": REPOSITORY, "sha": SHA, "siblings": [{"rfilename": n} for n in files]}).encode())
        name = path.split(f"/resolve/{SHA}/")[-1]
        if not path.startswith(f"/{REPOSITORY}/") or name not in files:
            return self.answer(b'{"error": "Repository not found"}', 404, send, [("X-Error-Code", "RepoNotFound"), ("X-Error-Message", "Repository not found")])
        body = files[name].read_bytes()
        headers = [("ETag", f'"{abs(hash(name)):040x}"'), ("X-Repo-Commit", SHA), ("Accept-Ranges", "bytes")]
        if not send:
            return self.answer(body, send=False, headers=headers)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.sent.append((name, start))
        if name.endswith(".safetensors") and name not in self.server.broken:
            self.server.broken.add(name)
            self.send_response(200)
            for key, value in (("Content-Length", len(body)), *headers):
                self.send_header(key, str(value))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.answer(body[start:], 206 if start else 200, headers=headers + ([("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")] if start else []))

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(pipeline, pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "remote")
    pipeline.transformer.save_pretrained(tmp_path / "remote/transformer", variant="fp16")
    (tmp_path / "remote/README.md").write_text("# not needed"), (tmp_path / "remote/asset.png").write_bytes(bytes(1000))
    path = tmp_path / "remote/vae/diffusion_pytorch_model.safetensors"  # the hub's client resumes from whole chunks of 10 MB
    save_file(load_file(path), path, metadata={"padding": "x" * 30_000_000})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.sent, server.broken = tmp_path / "remote", [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown(), server.server_close()


def test_a_model_is_downloaded_once_through_a_broken_connection(hub, photos, tmp_path, monkeypatch):
    server, environment = hub
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    data = write_pairs(photos, tmp_path)
    assert "4 steps" in run("train.py", "--data", data, "--model", REPOSITORY, *TRAIN, cwd=tmp_path)
    fetched = {name for name, _ in server.sent}
    assert fetched == {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
                       "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
                       "scheduler/scheduler_config.json"}
    assert len(server.broken) == 3 and max(start for _, start in server.sent) >= 10_000_000  # resumed, not begun again
    count = len(server.sent)
    run("train.py", "--data", data, "--model", REPOSITORY, *TRAIN, "--out", "again", cwd=tmp_path)
    assert len(server.sent) == count
    line = run("train.py", "--data", data, "--model", "someone/Absent", *TRAIN, "--out", "new", cwd=tmp_path, status=2)
    assert "someone/Absent" in line and "--model tiny" in line and "repository not found" in line.lower()
    server.shutdown(), server.server_close()
    run("train.py", "--data", data, "--model", REPOSITORY, *TRAIN, "--out", "offline", cwd=tmp_path)  # from the cache
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("evaluate.py", "--checkpoint", "offline", "--data", data, "--steps", 1, cwd=tmp_path)
    start = time.monotonic()
    line = run("train.py", "--data", data, "--model", "sana1.5-1.6b", *TRAIN, "--out", "new", cwd=tmp_path, status=2)
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in line
    monkeypatch.delenv("HF_HUB_OFFLINE")
    line = run("train.py", "--data", data, "--model", "sana1.5-1.6b", *TRAIN, "--out", "new", cwd=tmp_path, status=2)
    assert "no answer from" in line and "give its folder" in line and "--model tiny" in line and time.monotonic() - start < 30
    assert "hub id" in run("train.py", "--data", data, "--model", "nonsense", *TRAIN, "--out", "new", cwd=tmp_path, status=2)


def test_a_silent_network_is_given_up_within_ten_seconds(monkeypatch, tmp_path):
    """Connections are accepted and never answered."""
    import huggingface_hub
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError, match="no answer from .* not in the cache.*--model tiny"):
            find_model("someone/Never_Downloaded")
        assert 5 < time.monotonic() - start < 10


def test_of_a_repository_only_what_is_needed_is_fetched():
    names = ["README.md", "model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json",
             "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
             "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
             "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin", "tokenizer/tokenizer.json", "tokenizer/tokenizer.model"]
    assert set(needed_files(names)) == {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.bf16.json",
                                        "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors", "vae/config.json",
                                        "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"}


# From a folder to a restorer.

def write_pairs(photos, folder):
    lines = [f"{photos / f'{i:02d}.png'},,{'a picture' if i % 2 else ''}" for i in range(12)]
    (folder / "pairs.csv").write_text("image_path,condition_image_path,caption\n" + "\n".join(lines))
    return folder / "pairs.csv"


@pytest.mark.parametrize("conditioning", ["projection", "widen"])
def test_train_restore_and_export_from_a_folder(pipeline_folder, photos, tmp_path, conditioning):
    data = write_pairs(photos, tmp_path)
    shutil.copytree(pipeline_folder, tmp_path / "base")
    flags = ["--data", data, "--model", "base", *TRAIN, "--conditioning", conditioning, "--lr", "1e-3"]
    output = run("train.py", *flags, "--out", "run", cwd=tmp_path)
    assert "4 steps" in output and (tmp_path / "run/samples/step_000004.png").is_file()
    run("evaluate.py", "--checkpoint", "run", "--input", photos / "03.png", "--output", "r.png", "--steps", 2, "--sampler", "dpm",
        "--prompt", "Remove noise.", cwd=tmp_path)
    assert Image.open(tmp_path / "r.png").size == (96, 80)
    run("evaluate.py", "--checkpoint", "run", "--data", data, "--steps", 1, cwd=tmp_path)
    run("model.py", "export", "run", "exported", cwd=tmp_path)
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path / "exported").eval()
    assert theirs.config.in_channels == 16 and theirs.config.out_channels == 8
    restorer, config = load_restorer(tmp_path / "run")
    assert config["name"] == str((tmp_path / "base").resolve()) and config["conditioning"] == conditioning
    if conditioning == "projection":
        assert restorer.projection.weight[:, 8:].abs().max() > 1e-3  # it has moved
    g = torch.Generator().manual_seed(0)
    latents, condition, text = torch.randn(2, 8, 6, 5, generator=g), torch.randn(2, 8, 6, 5, generator=g), torch.randn(2, 7, 32, generator=g)
    timestep, mask = torch.tensor([10.0, 700.0]), torch.arange(7) < torch.tensor([7, 3])[:, None]
    with torch.no_grad():
        ours = restorer(latents, condition, timestep, text, mask)
        exported = theirs(torch.cat([latents, condition], 1), text, timestep, encoder_attention_mask=mask.float()).sample
    assert (ours - exported).abs().max() <= 1e-5 * exported.abs().max()
    # the last weights differ from their average; and what was exported can be trained further
    run("model.py", "export", "run", "last", "--weights", "model", cwd=tmp_path)
    last = load_file(tmp_path / "last/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(t, last[n]) for n, t in load_file(tmp_path / "exported/diffusion_pytorch_model.safetensors").items())
    shutil.rmtree(tmp_path / "base/transformer"), shutil.copytree(tmp_path / "exported", tmp_path / "base/transformer")
    run("train.py", "--data", data, "--model", "base", *TRAIN, "--out", "further", cwd=tmp_path)
    assert load_restorer(tmp_path / "further")[1]["conditioning"] == "widen"


def test_a_pretrained_run_resumes_and_restores_elsewhere(pipeline_folder, photos, tmp_path):
    """The base's transformer is no longer needed then, and the rest may have moved."""
    data = write_pairs(photos, tmp_path)
    shutil.copytree(pipeline_folder, tmp_path / "base")
    flags = ["--data", data, "--model", "base", "--lr", "1e-3", *TRAIN]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    run("train.py", *flags, "--out", "first", "--steps", 2, cwd=tmp_path)
    shutil.rmtree(tmp_path / "base/transformer")
    run("train.py", "--resume", "--out", "first", "--steps", 4, "--lr", "1e-3", cwd=tmp_path)
    for name in ("model", "ema"):  # the schedule knew of two steps only, so the weights differ, but not their names
        whole, resumed = (load_file(tmp_path / f"{r}/step_000004/{name}.safetensors") for r in ("whole", "first"))
        assert whole.keys() == resumed.keys() and all(t.isfinite().all() for t in resumed.values())
    (tmp_path / "base").rename(tmp_path / "moved")
    command = ["evaluate.py", "--checkpoint", "first", "--input", photos / "03.png", "--steps", 2, "--prompt", "Remove noise."]
    assert "base" in run(*command, "--output", "a.png", cwd=tmp_path, status=2)
    run(*command, "--output", "a.png", "--model", "moved", cwd=tmp_path)
    run(*command, "--output", "b.png", "--model", "moved", "--guidance", 4, cwd=tmp_path)
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert a.shape == (80, 96, 3) and not np.array_equal(a, b)


def test_bad_pretrained_folders_get_one_line(pipeline_folder, photos, tmp_path):
    data = write_pairs(photos, tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("half", "strange", "listed", "other", "widened"):
        shutil.copytree(pipeline_folder, tmp_path / name)
    next((tmp_path / "half/vae").glob("*.safetensors")).write_bytes(b"")

    def edit(path, **changes):
        (tmp_path / path).write_text(json.dumps(json.loads((tmp_path / path).read_text()) | changes))
    edit("strange/transformer/config.json", num_layers="two"), (tmp_path / "listed/vae/config.json").write_text("[]")
    edit("other/transformer/config.json", caption_channels=31), edit("widened/transformer/config.json", in_channels=16)
    for command, words in ((["train.py", "--data", data, "--resolution", "32", "--model", "empty"], ["transformer", "config.json"]),
                           (["train.py", "--data", data, "--resolution", "32", "--model", "half"], ["vae", "diffusion_pytorch_model.safetensors"]),
                           (["train.py", "--data", data, "--resolution", "32", "--model", "strange"], ["transformer/config.json", "SanaTransformer2DModel"]),
                           (["train.py", "--data", data, "--resolution", "32", "--model", "listed"], ["vae/config.json", "JSON object"]),
                           (["train.py", "--data", data, "--resolution", "32", "--model", "other"], ["texts of 31", "text encoder 32"]),
                           (["train.py", "--data", data, "--resolution", "32", "--model", "widened", "--conditioning", "projection"], ["--conditioning widen"]),
                           (["train.py", "--data", data, "--model", pipeline_folder, "--resolution", "30", "--out", "o"], ["--resolution", "multiple of 4"]),
                           (["model.py", "export", "empty", "out"], ["empty", "no checkpoint"]),
                           (["model.py", "import", "empty", "out"], ["export"])):
        line = run(*command, cwd=tmp_path, status=2)
        assert all(word in line for word in words), line
