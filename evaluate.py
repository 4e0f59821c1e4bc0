"""Restore pictures with a trained checkpoint, and measure how well it does.

    python evaluate.py --checkpoint out/demo --input noisy.jpg --output restored.jpg
    python evaluate.py --checkpoint out/demo --input photos/ --output restored/           a folder, names kept
    python evaluate.py --checkpoint out/demo --data val/pairs.csv                         table, CSV, JSON, grid

Pictures of any size and mode: grey stays grey, transparency is kept, 16-bit grey becomes 8-bit, EXIF rotation is
applied. --steps 1 gives the most faithful result (best PSNR), more steps give more texture.
"""
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import PICTURES, CsvPairs, PairedDataset, build_surroundings, list_images, seed_for, to_image, to_tensor
from degrade import (DEFAULT_DEGRADATIONS, Parser, UserError, label_tiles, make_folder, open_image, parse_degradations,
                     run_script, save_image, write_csv, write_text)
from model import build_restorer, draw_sigma, flow_loss, guided, load_restorer, sample
from vae import PixelAE, pad_to_multiple

# ----------------------------------------------------------------------------------------------------------------
# Metrics. Both images [B, 3, H, W] in [-1, 1]; one float64 value per image.


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / mse) over all pixels and channels; inf for equal images."""
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse)


def ssim(a, b):
    """Structural similarity (Wang et al. 2004): gaussian window 11x11 of sigma 1.5, population variances, mean over
    channels and over the positions where the window fits. scikit-image's with gaussian_weights, sigma=1.5,
    use_sample_covariance=False. Raises ValueError for images below 11 pixels."""
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs 11x11 pixels, not {a.shape[3]}x{a.shape[2]}")
    a, b = a.double() + 1, b.double() + 1                                   # black must be 0: SSIM compares means
    window = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64, device=a.device) / 1.5) ** 2)
    window = (window / window.sum()).expand(3, 1, 1, 11)

    def blur(x):                                                            # [B, 3, H, W] -> [B, 3, H-10, W-10]
        return F.conv2d(F.conv2d(x, window, groups=3), window.transpose(2, 3), groups=3)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                               # 2 = range of [-1, 1]
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


# ----------------------------------------------------------------------------------------------------------------
# Restoring.

def check_device(name):
    """name, if this machine has that torch device. Raises UserError if not."""
    try:
        return torch.zeros(1, device=name).cpu() is not None and name
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from None


TILE, OVERLAP = 1024, 64  # pixels: the tiny preset restores larger pictures in tiles, so that memory stays bounded (1 GB)


@torch.no_grad()
def restore(restorer, autoencoder, prompts, pixels, captions, steps=1, seed=0, sampler="euler", guidance=1.0):
    """Degraded pixels [B, 3, H, W] in [-1, 1] of any size, and a caption each -> restored pixels, clipped to [-1, 1].
    The noise depends on the seed and the image size alone: an image comes out the same whatever is beside it."""
    height, width = pixels.shape[2:]
    f = autoencoder.factor
    pixels = pad_to_multiple(pixels, f * restorer.sana.config["patch_size"])
    generator = torch.Generator().manual_seed(seed_for(seed, 0, "restore"))
    noise = torch.randn(autoencoder.channels, *(side // f for side in pixels.shape[2:]), generator=generator).to(pixels)
    prompts.prepare([*captions, ""])
    text, empty = ([t.to(pixels.device) for t in prompts(c)] for c in (captions, [""] * len(captions)))

    def part(at):
        condition = autoencoder.encode(pixels[at])                          # [B, C, h, w]
        rows, columns = (slice(side.start // f, side.stop // f) for side in at[1:])
        start = noise[:, rows, columns].expand_as(condition)
        velocity = guided(lambda x, *rest: restorer(x, condition, *rest), text, empty, guidance)
        return autoencoder.decode(sample(velocity, start, steps, sampler, restorer.shift))
    # latents are small: the whole picture goes through the transformer at once
    tile = TILE if isinstance(autoencoder, PixelAE) else max(pixels.shape[2:])
    return in_tiles(part, pixels.shape[2:], tile, OVERLAP)[..., :height, :width].clamp(-1, 1)


def in_tiles(function, size, tile, overlap, scale=1):
    """Compute a large picture in overlapping tiles, blended linearly over their overlaps.

    function(at) -> [B, C, h, w], the output for the part `at` of the input, a (..., rows, columns) index.
    size: (H, W) of the input; tile, overlap: in input positions; scale: output positions per input position.
    """
    if max(size) <= tile:
        return function((..., slice(0, size[0]), slice(0, size[1])))
    total = weights = None
    for top in tile_starts(size[0], tile, overlap):
        for left in tile_starts(size[1], tile, overlap):
            part = function((..., slice(top, top + tile), slice(left, left + tile)))
            if total is None:
                shape = [round(side * scale) for side in size]
                total, weights = part.new_zeros(*part.shape[:2], *shape), part.new_zeros(shape)
            height, width = part.shape[2:]
            y, x = round(top * scale), round(left * scale)
            weight = ramp(height, overlap * scale).to(part)[:, None] * ramp(width, overlap * scale).to(part)
            total[..., y:y + height, x:x + width] += weight * part
            weights[y:y + height, x:x + width] += weight
    return total.div_(weights)


def tile_starts(length, tile, overlap):
    """Where tiles that overlap by at least overlap begin, the last one ending at length."""
    return [0] if length <= tile else [*range(0, length - tile, tile - overlap), length - tile]


def ramp(length, overlap):
    """Weights that rise over the overlap from either end, to blend neighbouring tiles."""
    i = torch.arange(length)
    return torch.minimum(i + 1, length - i).clamp(max=overlap) / overlap


def default_steps(restorer):
    """A network that predicts the clean image does so in one step; a pretrained one was trained to walk."""
    return 1 if restorer.prediction == "residual" else 20


def restore_image(image, caption, **how):
    """A picture as open_image gives it -> the restored one, grey if it was grey, with its transparency."""
    device = next(how["restorer"].parameters()).device
    pixels = restore(pixels=to_tensor(image)[None].to(device), captions=[caption], **how)
    restored = to_image(pixels[0]).convert(image.mode.rstrip("A"))
    if "A" in image.mode:
        restored.putalpha(image.getchannel("A"))
    return restored


def restore_files(source, target, **how):
    """Restore a file, or every picture below a folder into another folder under the same names."""
    source, target = Path(source), Path(target)
    if source.is_dir():
        if target.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--output {target} lies inside --input {source}; choose a folder elsewhere")
        work = [(path, target / path.relative_to(source)) for path in list_images(source)]
    else:
        work = [(source, target / source.name if target.is_dir() else target)]
    for path, out in work:
        if out.suffix.lower() not in PICTURES:
            raise UserError(f"--output {out}: give a file name with a picture's extension, such as .png")
        if out.resolve() == path.resolve():
            raise UserError(f"--output {out} would write over the input; choose another")
    for path, out in tqdm(work, unit="img", desc="restore", disable=len(work) == 1):
        restored = restore_image(open_image(path), **how)
        if "A" in restored.mode and out.suffix.lower() in (".jpg", ".jpeg", ".bmp", ".ppm", ".pgm"):
            print(f"{out}: this format holds no transparency; saved without", file=sys.stderr)
            restored = restored.convert(restored.mode.rstrip("A"))
        save_image(restored, out, **({"quality": 95} if out.suffix.lower() in (".jpg", ".jpeg", ".webp") else {}))
    print(f"restored {len(work)} image(s) -> {target}")


# ----------------------------------------------------------------------------------------------------------------
# Measuring.

def score(clean, image):
    """{"psnr", "ssim"} of one picture [3, H, W], as it will be saved: rounded to 8 bits."""
    image = to_tensor(to_image(image))
    return {"psnr": psnr(image[None], clean[None]).item(),
            "ssim": ssim(image[None], clean[None]).item() if min(clean.shape[1:]) >= 11 else math.nan}


def evaluate_pairs(dataset, names, prompt=None, quiet=False, **how):
    """prompt: instead of each pair's own caption. how: the arguments of restore.
    -> rows [{"image", "input_psnr", "restored_psnr", "input_ssim", "restored_ssim"}], and of the first eight images
    the labelled pictures [[("degraded ...", PIL), ("restored ...", PIL), ("clean", PIL)]]."""
    device = next(how["restorer"].parameters()).device
    captions = [dataset.plan(i)[2] if prompt is None else prompt for i in range(len(dataset))]
    how["prompts"].prepare([*captions, ""])
    rows, pictures = [], []
    for i in (bar := tqdm(range(len(dataset)), unit="img", desc="evaluate", disable=quiet)):
        item = dataset.draw(i)
        pixels = restore(pixels=item["condition"][None].to(device), captions=[captions[i]], **how)[0].cpu()
        before, after = score(item["clean"], item["condition"]), score(item["clean"], pixels)
        rows.append({"image": names[i], "input_psnr": before["psnr"], "restored_psnr": after["psnr"],
                     "input_ssim": before["ssim"], "restored_ssim": after["ssim"]})
        if len(pictures) < 8:
            labels = f"degraded {before['psnr']:.2f} dB", f"restored {after['psnr']:.2f} dB", "clean"
            pictures.append([(label, to_image(t)) for label, t in zip(labels, (item["condition"], pixels, item["clean"]))])
        bar.set_postfix_str(f"PSNR {before['psnr']:.2f} -> {after['psnr']:.2f} dB")
    return rows, pictures


@torch.no_grad()
def mean_loss(dataset, restorer, autoencoder, prompts, seed):
    """The training loss over a data set's images, with fixed noise and sigmas."""
    device, generator = next(restorer.parameters()).device, torch.Generator().manual_seed(seed_for(seed, 0, "validation loss"))
    total = 0.0
    for i in range(len(dataset)):
        item = dataset.draw(i)
        x0, condition = (autoencoder.encode(item[key][None].to(device)) for key in ("clean", "condition"))
        noise, sigma = torch.randn(x0.shape, generator=generator), draw_sigma(1, generator, shift=restorer.shift)
        text = (t.to(device) for t in prompts([item["caption"]]))
        total += flow_loss(restorer, x0, condition, *text, sigma.to(device), noise.to(device)).item()
    return total / len(dataset)


def mean_of(rows):
    """The mean of each column; images restored perfectly (PSNR inf) or too small for SSIM (nan) are left out of it."""
    means = {}
    for key in [k for k in rows[0] if k != "image"]:
        finite = [row[key] for row in rows if math.isfinite(row[key])]
        means[key] = sum(finite) / len(finite) if finite else math.nan
    return means


def print_table(rows, means):
    width = max(len(row["image"]) for row in rows + [{"image": "mean"}])
    print(f"{'image':{width}}  input PSNR  restored   input SSIM  restored")
    for row in rows + [{"image": "mean"} | means]:
        print(f"{row['image']:{width}}  {row['input_psnr']:10.2f}  {row['restored_psnr']:8.2f}   "
              f"{row['input_ssim']:10.4f}  {row['restored_ssim']:8.4f}")
    for key in [k for k in means if any(not math.isfinite(row[k]) for row in rows)]:
        print(f"{sum(not math.isfinite(row[key]) for row in rows)} image(s) without a finite {key} are not in its mean")


def draw_grid(pictures, tile=256):
    """Rows of labelled pictures, as evaluate_pairs gives them: the centre of each, at most tile pixels wide, unscaled;
    two rows side by side if there are more than four."""
    side = min(tile, *(min(image.size) for row in pictures for _, image in row))
    tiles = []
    for label, image in (picture for row in pictures for picture in row):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        tiles.append((label, image.crop((left, top, left + side, top + side))))
    return label_tiles(tiles, columns=len(pictures[0]) * (1 + (len(pictures) > 4)))


# ----------------------------------------------------------------------------------------------------------------
# Following a training run.

BINS = 4  # of sigma, in which the loss is logged
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}  # bf16 FLOP/s, dense


class Meter:
    """What a line of the log says of the steps since the line before."""

    def __init__(self, state, processes):
        self.state, self.processes, self.skipped = state, processes, 0
        self.reset()

    def reset(self):
        self.since, self.waited, self.steps = time.monotonic(), 0.0, 0
        self.sums = [0.0] * (2 * BINS)  # losses by bin of sigma, and how many there were

    def wait_for(self, loader):
        """The next batch, and how long that took (None after the last)."""
        before = time.monotonic()
        batch = next(loader, None)
        self.waited += time.monotonic() - before
        return batch

    def count(self, sums, finite):
        self.steps += 1
        self.skipped += not finite
        if finite:
            self.sums = [a + b for a, b in zip(self.sums, sums)]

    def entry(self, norm):
        state, seconds = self.state, time.monotonic() - self.since
        losses, counts, speed = self.sums[:BINS], self.sums[BINS:], self.steps * state.args.batch_size / seconds
        line = {"step": state.step, "loss": sum(losses) / max(1, sum(counts)), "norm": norm, "condition_norm": state.condition_norm(),
                "loss_by_sigma": [loss / n if n else None for loss, n in zip(losses, counts)], "images_per_second": speed,
                "data_wait": self.waited / seconds, "memory_gb": peak_memory(state.args.device), "skipped": self.skipped}
        name = torch.cuda.get_device_name() if state.args.device.startswith("cuda") else ""
        for peak in (flops for known, flops in PEAK.items() if known in name):  # model FLOPs utilization (arXiv 2204.02311)
            line["mfu"] = speed * training_flops(state.config, state.grid) / (self.processes * peak)
        self.reset()
        return line


def peak_memory(device):
    """GiB: what tensors took at most on a GPU, what the process took on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)


def training_flops(config, grid, tokens=32):
    """Of one image with a latent grid (H, W): forward, and twice that for the gradient."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        restorer = build_restorer(config)
        c = restorer.sana.config
        latents = torch.empty(1, c["out_channels"], *grid)
        restorer(latents, latents, torch.empty(1), torch.empty(1, tokens, c["caption_channels"]))
    return 3 * counter.get_total_flops()


def draw_curves(log, curves, path):
    """One panel below the other, each a value of the log's lines over their steps. curves: {key: title}; losses on a log scale."""
    width, height, margin = 640, 240, 44
    picture = Image.new("RGB", (width, len(curves) * height), "white")
    draw = ImageDraw.Draw(picture)
    for panel, (key, title) in enumerate(curves.items()):
        top, log_scale = panel * height, "loss" in key
        points = [(line["step"], math.log10(max(line[key], 1e-12)) if log_scale else line[key]) for line in log if key in line]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        draw.text((margin, top + 4), title, fill="black")
        if not points:
            continue
        low, high, last = min(p[1] for p in points), max(p[1] for p in points), max(1, points[-1][0])
        y_of = lambda v: top + height - 28 - (v - low) / max(high - low, 1e-9) * (height - 56)
        x_of = lambda step: margin + step / last * (width - margin - 12)
        for value in (low, (low + high) / 2, high):
            draw.line([(margin, y_of(value)), (width - 12, y_of(value))], fill="#dddddd")
            draw.text((4, y_of(value) - 6), f"{10 ** value:.3g}" if log_scale else f"{value:.2f}", fill="black")
        draw.line([(x_of(s), y_of(v)) for s, v in points], fill="#1f5fbf", width=2)
        draw.text((width - 80, top + height - 20), f"step {last}", fill="black")
    save_image(picture, path)


# ----------------------------------------------------------------------------------------------------------------
# The command line.

def measure(args, prompt, **how):
    """--data: scores, table, scores.csv, scores.json, grid.png."""
    source, out = CsvPairs(args.data), make_folder(args.output or "out/evaluation")
    dataset = PairedDataset(source, None, parse_degradations(args.degradations), training=False, seed=args.seed)
    rows, pictures = evaluate_pairs(dataset, [os.path.relpath(row[1], source.path.parent) for row in source.rows], prompt, **how)
    means = mean_of(rows)
    print_table(rows, means)
    save_image(draw_grid(pictures), out / "grid.png")
    write_csv(out / "scores.csv", [list(rows[0])] + [list(row.values()) for row in rows])
    # JSON has neither inf nor nan: null
    for row in rows + [means]:
        row.update({k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)})
    flags = {key: getattr(args, key) for key in ("checkpoint", "data", "degradations", "steps", "sampler", "guidance", "seed", "prompt")}
    report = flags | {"mean": means, "images": rows}
    write_text(out / "scores.json", json.dumps(report, indent=1))
    print(f"{out}/scores.csv, scores.json, grid.png (sampling steps: {how['steps']})")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="run folder of train.py, or one of its step folders")
    parser.add_argument("--input", help="picture, or folder of pictures, to restore")
    parser.add_argument("--output", help="where the restored picture or folder goes; with --data, the scores and "
                        "the grid (default out/evaluation)")
    parser.add_argument("--data", help="pairs.csv to measure on")
    parser.add_argument("--prompt", help='what to do, e.g. "Remove JPEG artifacts."; "" lets the model judge '
                        '(default: "" for --input, the captions of --data)')
    parser.add_argument("--degradations", nargs="+", default=DEFAULT_DEGRADATIONS, metavar="NAME",
                        help="for rows of --data without a condition image: what to degrade them with")
    parser.add_argument("--steps", type=int, help="sampling steps; 1: best PSNR, more: more texture (default: 1 for the tiny "
                        "preset, 20 for pretrained models)")
    parser.add_argument("--sampler", choices=["euler", "dpm"], default="euler", help="dpm: DPM-Solver++ 2M (default euler)")
    parser.add_argument("--guidance", type=float, default=1.0, help="how far to go beyond what the prompt asks, away from "
                        "what no prompt gives (default 1: no further)")
    parser.add_argument("--model", help="where the autoencoder and text encoder of a pretrained model are now (default: where "
                        "they were in training)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise and of degradations made here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    args = parser.parse_args()
    if bool(args.input) == bool(args.data):
        raise UserError("give either --input (pictures to restore) or --data (pairs to measure on)")
    if args.input and not args.output:
        raise UserError("--input needs --output: where to write the restored picture")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least 1")
    restorer, config = load_restorer(args.checkpoint)
    autoencoder, prompts = build_surroundings(config | ({"name": args.model} if args.model else {}), check_device(args.device))
    args.steps = args.steps or default_steps(restorer)
    how = {"restorer": restorer.to(args.device), "autoencoder": autoencoder, "prompts": prompts, "steps": args.steps,
           "seed": args.seed, "sampler": args.sampler, "guidance": args.guidance}
    if args.input:
        restore_files(args.input, args.output, caption=args.prompt or "", **how)
    else:
        measure(args, prompt=args.prompt, **how)


if __name__ == "__main__":
    run_script(main)
