"""Train an image restorer on pairs of clean and degraded images.

    python train.py                                          the built-in demo: procedural images, no files needed
    python train.py --data pairs/pairs.csv                   your own pairs (see data.py)
    python train.py --data photos.csv --degradations gaussian_noise:sigma=25
    python train.py --data pairs/pairs.csv --model sana1.5-1.6b      from pretrained SANA (the default on a GPU)
    python train.py --resume --out out/demo                  go on after Ctrl-C, as if never stopped

Writes to out/RUN: config.json, log.jsonl, loss.png, samples/ (degraded | restored | clean), checkpoints step_N/.
"""
import json
import math
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CsvPairs, DeadLeaves, PairedDataset, build_surroundings, collate, seed_for
from degrade import (DEFAULT_DEGRADATIONS, Parser, UserError, make_folder, parse_degradations, run_script, save_image,
                     write_text)
from evaluate import check_device, default_steps, draw_grid, evaluate_pairs, mean_of
from model import PRESETS, SHIFT, Restorer, Sana, build_restorer, draw_sigma, find_checkpoint, flow_loss
from vae import HUB, find_model, load_weights, read_json, save_weights

# flags whose default depends on the model: pixels from scratch, or latents from pretrained weights
SCRATCH = {"lr": 5e-3, "steps": 8000, "resolution": 48, "share_at_one": 0.3, "clip": 1.0}
PRETRAINED = {"lr": 1e-5, "steps": 10000, "resolution": 512, "share_at_one": 0.0, "clip": 0.1}


def parse_args(argv=None):
    parser = Parser(__doc__)
    # what to train on
    parser.add_argument("--data", metavar="CSV", help="header image_path,condition_image_path,caption (default: the demo)")
    parser.add_argument("--degradation", choices=["auto", "on_the_fly", "paired"], default="auto",
                        help="auto: degrade on the fly the rows without a condition image; on_the_fly: all; paired: none")
    parser.add_argument("--degradations", nargs="+", default=list(DEFAULT_DEGRADATIONS), metavar="NAME",
                        help="the set to draw from, e.g. jpeg gaussian_noise:sigma=25 (default: all but color_jitter)")
    parser.add_argument("--max_degradations", type=int, default=3, help="1 to this many per image (default 3)")
    parser.add_argument("--resolution", type=int, help="side of the training crops, in pixels (default 48 for tiny, else 512)")
    parser.add_argument("--caption_dropout", type=float, default=0.1, help="share of captions replaced by the empty one")
    # the model
    parser.add_argument("--model", help=f"tiny, trained from scratch; or a pretrained one to start from: {', '.join(HUB)}, a hub "
                        "id, or a folder in the hub's layout (default: sana1.5-1.6b for --data on a GPU, else tiny)")
    parser.add_argument("--conditioning", choices=["projection", "widen"], help="how the degraded image enters: a 1x1 "
                        "convolution in front, or a patch embedding with twice the channels (default: the preset's)")
    parser.add_argument("--share_at_one", type=float, help="share of training at sigma = 1, where one-step restoration "
                        "happens (default 0.3 for tiny, else 0)")
    # optimization
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 8000 for tiny, 2500 for the demo, else 10000)")
    parser.add_argument("--batch_size", type=int, default=4, help="default 4")
    parser.add_argument("--lr", type=float, help="peak; rises for 2%% of the steps, then falls as a cosine to 0 (default 5e-3 "
                        "for tiny, else 1e-5)")
    parser.add_argument("--proj_lr", type=float, help="for --conditioning projection, that layer's (default 10 * lr)")
    parser.add_argument("--optimizer", choices=["adamw", "adamw_bf16", "adamw_sr"], help="adamw: fp32, torch's. adamw_bf16: the same "
                        "steps with weights and moments in bf16 and the weights' lost bits beside them. adamw_sr: bf16 weights, "
                        "rounded stochastically (default: adamw_bf16 for pretrained models on a GPU, else adamw)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N parts, for memory (default 1)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again for the gradient instead of keeping them")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's (default 0)")
    parser.add_argument("--clip", type=float, help="largest gradient norm (default 1 for tiny, else 0.1, as SANA was trained)")
    parser.add_argument("--ema_decay", type=float, default=0.9999, help="of the averaged weights that are evaluated")
    parser.add_argument("--seed", type=int, default=0, help="of everything random: same seed, same run")
    # the run
    parser.add_argument("--out", help="run folder (default out/demo, or out/NAME for NAME.csv)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out; flags given now win over its own")
    parser.add_argument("--overwrite", action="store_true", help="delete a run that --out holds already")
    parser.add_argument("--save_every", type=int, default=1000, metavar="STEPS", help="write a checkpoint this often (default 1000)")
    parser.add_argument("--keep", type=int, default=1, metavar="N", help="newest checkpoints to keep, beside the best by validation (default 1)")
    parser.add_argument("--val_every", type=int, default=500, metavar="STEPS", help="measure held-out images this often (default 500)")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")

    args = parser.parse_args(argv)
    args.out = args.out or f"out/{Path(args.data).stem if args.data else 'demo'}"
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run, --overwrite deletes it: give one of them")
    if args.resume:  # the run's own settings become the defaults
        folder = find_checkpoint(args.out)
        try:
            saved = json.loads((folder / "config.json").read_text())["args"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{folder}: not a usable checkpoint: {error!r}") from None
        args = parser.parse_args(argv, Namespace(**saved | {"out": args.out}))
    if args.model is None:
        args.model = "sana1.5-1.6b" if args.data and args.device.startswith("cuda") else "tiny"
    scratch = args.model in PRESETS
    for name, value in (SCRATCH | ({} if args.data else {"steps": 2500}) if scratch else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.optimizer is None:
        args.optimizer = "adamw_bf16" if not scratch and args.device.startswith("cuda") else "adamw"
    check_args(args)
    return args


def check_args(args):
    """Raises UserError for a value that makes no sense."""
    for name in ("steps", "batch_size", "resolution", "max_degradations", "save_every", "val_every", "accumulate", "keep"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    for name, high in (("lr", 1), ("proj_lr", 1), ("weight_decay", 100), ("ema_decay", 1), ("caption_dropout", 1),
                       ("share_at_one", 1), ("clip", math.inf), ("workers", 1000)):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= high:
            raise UserError(f"--{name} {value}: from 0 to {high}")
    if args.batch_size % args.accumulate:
        raise UserError(f"--accumulate {args.accumulate}: a divisor of --batch_size {args.batch_size}")
    check_device(args.device)


# ----------------------------------------------------------------------------------------------------------------
# Data.

VALIDATION_CROP = 192


def make_datasets(args):
    """-> training draws, and validation pairs that are never trained on."""
    options = dict(degradations=parse_degradations(args.degradations), degradation=args.degradation,
                   max_degradations=args.max_degradations, caption_dropout=args.caption_dropout)
    if args.data is None:
        source = DeadLeaves(256, max(128, args.resolution), args.seed)
        train = PairedDataset(source, args.resolution, seed=args.seed, **options)
        held_out = DeadLeaves(8, VALIDATION_CROP, seed_for(args.seed, 0, "held out"))
        return train, PairedDataset(held_out, None, training=False, seed=args.seed, **options)
    source = CsvPairs(args.data)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed_for(args.seed, 0, "held out"))).tolist()
    count = min(8, len(source) // 10)
    if not count:
        print(f"{args.data} has {len(source)} rows, too few to hold any out: validation is on training images")
    held_out = order[:count] or order
    kept_out = {source.rows[i][1] for i in order[:count]}  # a clean photo may stand in several rows
    rows = [i for i in order if source.rows[i][1] not in kept_out]
    if not rows:
        raise UserError(f"{args.data}: all rows have the same clean image; training needs more")
    smallest = min(min(source.load(i)[0].size) for i in held_out)
    crop = min(max(VALIDATION_CROP, args.resolution), smallest)
    return (PairedDataset(source, args.resolution, rows=rows, seed=args.seed, **options),
            PairedDataset(source, crop, rows=held_out, training=False, seed=args.seed, **options))


def ignore_interrupt(_):
    """Workers leave Ctrl-C to the main process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset, args, start):
    """Batches of draws start * batch_size, ... : what a step sees depends on its number alone."""
    draws = range(start * args.batch_size, args.steps * args.batch_size)
    return DataLoader(dataset, args.batch_size, sampler=draws, num_workers=args.workers, collate_fn=collate,
                      worker_init_fn=ignore_interrupt, pin_memory=args.device.startswith("cuda"))


# ----------------------------------------------------------------------------------------------------------------
# AdamW in bf16. At lr 1e-5 a step is far below half an ulp of a bf16 weight: rounding to nearest would lose nearly all.

def split_fp32(weight):
    """fp32 -> (nearest bf16, int16: what the fp32 bit pattern has beyond that of the bf16). Nothing is lost."""
    bits = weight.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_fp32(high, low):
    """The inverse of split_fp32."""
    return ((high.view(torch.int16).int() << 16) + low).view(torch.float32)


def round_stochastically(x, noise):
    """fp32 -> bf16, up or down by chance so that the mean is x. noise: uniform int16."""
    return ((x.view(torch.int32) + (noise.int() & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)


class BF16AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with fp32 arithmetic and little memory: a bf16 weight has its low 16 bits beside it (exact=True:
    the steps are fp32's, 2 + 2 bytes) or is rounded stochastically (exact=False: 2 bytes); moments are bf16, the second one
    rounded stochastically, because beta2 moves it by less than half an ulp. fp32 weights keep fp32 moments."""

    CHUNK = {"cpu": 1 << 16}  # weights at a time: what a CPU's cache holds; else 2^24, for few launches on a GPU

    def __init__(self, groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, exact=True, moments=torch.bfloat16):
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": weight_decay})
        for p in (p for group in self.param_groups for p in group["params"]):
            half = p.dtype == torch.bfloat16
            self.state[p] = {key: torch.zeros_like(p, dtype=moments if half else p.dtype) for key in ("exp_avg", "exp_avg_sq")}
            if half and exact:
                self.state[p]["low"] = torch.zeros_like(p, dtype=torch.int16)

    @torch.no_grad()
    def step(self, count, seed, scale=1.0):
        """The count-th step (from 1). seed: of the rounding. scale: factor of the gradients (clipping)."""
        for group in self.param_groups:
            for p in group["params"]:
                generator = torch.Generator(p.device).manual_seed(seed)
                noise = torch.empty(self.CHUNK.get(p.device.type, 1 << 24) // 4, dtype=torch.int64, device=p.device)  # 4 x 16 bits each
                state, seed = self.state[p], seed + 1
                flat = [t.view(-1).split(4 * len(noise)) for t in (p.data, p.grad.contiguous(), *state.values())]
                for weight, grad, *rest in zip(*flat):
                    if weight.dtype == torch.bfloat16:
                        noise.random_(-2**63, None, generator=generator)
                    self._update(group, count, weight, grad.float() * scale, noise.view(torch.int16)[:len(weight)], *rest)

    @staticmethod
    def _update(group, count, weight, grad, noise, exp_avg, exp_avg_sq, low=None):
        (beta1, beta2), lr = group["betas"], group["lr"]
        w = weight if weight.dtype == torch.float32 else weight.float() if low is None else join_fp32(weight, low)
        m = exp_avg.float().lerp_(grad, 1 - beta1)
        v = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        w.mul_(1 - lr * group["weight_decay"])
        w.addcdiv_(m, (v.sqrt() / math.sqrt(1 - beta2**count)).add_(group["eps"]), value=-lr / (1 - beta1**count))
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v if exp_avg_sq.dtype == v.dtype else round_stochastically(v, noise))
        if low is not None:
            for kept, new in zip((weight, low), split_fp32(w)):
                kept.copy_(new)
        elif w is not weight:
            weight.copy_(round_stochastically(w, noise))


# ----------------------------------------------------------------------------------------------------------------
# State. A checkpoint holds everything that the next step depends on; randomness needs no state (see seed_for).

def describe_model(args):
    """"model" of config.json: all that is needed to build the restorer again, but its weights."""
    if args.model in PRESETS:
        config = PRESETS[args.model]
    else:
        folder = find_model(args.model)
        sana, about = Sana.from_config(folder / "transformer").config, read_json(folder / "transformer" / "config.json")
        name = str(folder.resolve()) if Path(args.model).is_dir() else args.model
        scheduler = folder / "scheduler" / "scheduler_config.json"
        config = {"name": name, "autoencoder": None, "sana": sana, "prediction": about.get("_prediction", "velocity"),
                  "conditioning": "projection" if sana["in_channels"] == sana["out_channels"] else "widen",
                  "shift": read_json(scheduler).get("flow_shift", SHIFT) if scheduler.is_file() else SHIFT}
    config = config | {"conditioning": args.conditioning or config["conditioning"]}
    with torch.device("meta"):
        build_restorer(config)  # so that what cannot be built is said before anything is loaded
    return config


STEPS = "step_" + "[0-9]" * 6  # what a checkpoint folder is called


class State:
    """Weights, their moving average, AdamW's moments and the number of steps done; and what stands around them."""

    def __init__(self, config, autoencoder, prompts, args):
        self.step, self.config, self.autoencoder, self.prompts, self.args = 0, config, autoencoder, prompts, args
        self.best = [-math.inf, None]  # validation PSNR, name of the checkpoint that had it
        if args.resume:  # load() fills it
            with torch.device("meta"):
                self.restorer = build_restorer(config)
            self.restorer.to_empty(device="cpu")
        elif config["autoencoder"]:
            self.restorer = build_restorer(config)
            self.restorer.sana.initialize(torch.Generator().manual_seed(seed_for(args.seed, 0, "weights")))
        else:
            sana = Sana.from_pretrained(find_model(config["name"]) / "transformer", torch.float32)
            self.restorer = Restorer(sana, config["conditioning"], config["prediction"], config["shift"])
        self.restorer.to(args.device).train()
        self.restorer.sana.checkpointing = args.checkpointing
        self.ema = {name: p.detach().float().clone() for name, p in self.restorer.named_parameters()}
        if args.optimizer != "adamw":
            self.restorer.sana.to(torch.bfloat16)
        self.parameters = dict(self.restorer.named_parameters())
        projection = [p for name, p in self.parameters.items() if name.startswith("projection")]
        others = [p for name, p in self.parameters.items() if not name.startswith("projection")]
        # the projection starts at 0 and has to travel to order 1: at the common rate it never arrives
        proj_lr = 10 * args.lr if args.proj_lr is None else args.proj_lr
        groups = [{"params": others, "peak": args.lr}, {"params": projection, "peak": proj_lr}]
        options = {"betas": (0.9, 0.99), "weight_decay": args.weight_decay}
        if args.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups, **options, fused=True)
        else:
            self.optimizer = BF16AdamW(groups, **options, exact=args.optimizer == "adamw_bf16")
            for name, p in self.parameters.items():  # weights from scratch have low bits as well
                if "low" in self.optimizer.state[p]:
                    for kept, value in zip((p.data, self.optimizer.state[p]["low"]), split_fp32(self.ema[name])):
                        kept.copy_(value)

    def fp32(self, p):
        """The exact value of a weight."""
        low = self.optimizer.state[p].get("low")
        return p.detach().float() if low is None else join_fp32(p.detach(), low)

    def update_weights(self, scale):
        """One optimizer step with the gradients times scale, and the moving average's: ema <- decay * ema + (1 - decay) * weights.
        The decay warms up, so that the start is soon forgotten."""
        self.step += 1
        if self.args.optimizer == "adamw":
            torch._foreach_mul_([p.grad for p in self.parameters.values()], scale)
            self.optimizer.step()
        else:
            self.optimizer.step(self.step, seed_for(self.args.seed, self.step, "rounding"), scale)
        decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
        for name, p in self.parameters.items():
            self.ema[name].lerp_(self.fp32(p), 1 - decay)

    def averaged(self):
        """A Restorer with the EMA weights, for validation and samples."""
        with torch.device("meta"):
            restorer = build_restorer(self.config).eval()
        restorer.load_state_dict(self.ema, assign=True)  # the averages themselves, not a copy
        return restorer

    def save(self, run, validation):
        """Write run/step_N beside and rename it into place, then point run/latest at it (and run/best, if no other has had a
        higher validation PSNR), then delete all but these and the newest --keep."""
        folder = run / f"step_{self.step:06d}"
        partial = run / f".{folder.name}.partial"
        moments = {f"{key}.{name}": value for name, p in self.parameters.items()
                   for key, value in self.optimizer.state[p].items() if key != "step"}
        if validation["restored_psnr"] >= self.best[0]:
            self.best = [validation["restored_psnr"], folder.name]
        config = {"step": self.step, "model": self.config, "args": vars(self.args), "validation": validation, "best": self.best}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_weights(self.restorer.state_dict(), partial / "model.safetensors")
            save_weights(self.ema, partial / "ema.safetensors")
            save_weights(moments, partial / "optimizer.safetensors")
            (partial / "config.json").write_text(json.dumps(config, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except OSError as error:
            raise UserError(f"cannot write checkpoint {folder}: {error}") from None
        write_text(run / "latest", folder.name)
        write_text(run / "best", self.best[1] or folder.name)
        for old in sorted(run.glob(STEPS))[:-self.args.keep]:
            if old.name not in (folder.name, self.best[1]):
                shutil.rmtree(old, ignore_errors=True)

    def load(self, folder):
        """The inverse of save. Raises UserError for a damaged checkpoint."""
        try:
            load_weights(self.restorer, folder / "model.safetensors")
            ema, moments = load_file(folder / "ema.safetensors"), load_file(folder / "optimizer.safetensors")
            config = read_json(folder / "config.json")
            self.step, self.best = config["step"], config["best"]
            for name, p in self.parameters.items():
                self.ema[name].copy_(ema[name])
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step), device=p.device)} if self.args.optimizer == "adamw" else {}
                self.optimizer.state[p] |= {key: moments[f"{key}.{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq", "low")
                                            if key != "low" or p.dtype == torch.bfloat16 and self.args.optimizer == "adamw_bf16"}
        except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            raise UserError(f"{folder}: not a usable checkpoint: {error!r}") from None


# ----------------------------------------------------------------------------------------------------------------
# What a person looks at.

def draw_curve(log, path):
    """loss.png: the training loss (log scale) and below it the validation PSNR, over the steps."""
    width, height, margin = 640, 240, 44
    picture = Image.new("RGB", (width, 2 * height), "white")
    draw = ImageDraw.Draw(picture)
    losses = [(entry["step"], math.log10(max(entry["loss"], 1e-12))) for entry in log if "loss" in entry]
    scores = [(entry["step"], entry["restored_psnr"]) for entry in log if "restored_psnr" in entry]
    panels = [("training loss", losses, lambda v: f"{10 ** v:.3g}"), ("validation PSNR, dB", scores, lambda v: f"{v:.2f}")]
    for panel, (title, points, text) in enumerate(panels):
        top = panel * height
        draw.text((margin, top + 4), title, fill="black")
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if not points:
            continue
        low, high, last = min(p[1] for p in points), max(p[1] for p in points), max(1, points[-1][0])
        y_of = lambda v: top + height - 28 - (v - low) / max(high - low, 1e-9) * (height - 56)
        x_of = lambda step: margin + step / last * (width - margin - 12)
        for value in (low, (low + high) / 2, high):
            draw.line([(margin, y_of(value)), (width - 12, y_of(value))], fill="#dddddd")
            draw.text((4, y_of(value) - 6), text(value), fill="black")
        draw.line([(x_of(s), y_of(v)) for s, v in points], fill="#1f5fbf", width=2)
        draw.text((width - 80, top + height - 20), f"step {last}", fill="black")
    save_image(picture, path)


def validate(state, dataset, run):
    """Fixed pairs, fixed noise, EMA weights -> mean PSNR and SSIM of input and restored; saves a sample grid."""
    rows, pictures = evaluate_pairs(dataset, [str(i) for i in range(len(dataset))], quiet=True, restorer=state.averaged(),
                                    autoencoder=state.autoencoder, prompts=state.prompts, seed=state.args.seed,
                                    steps=default_steps(state.restorer))
    save_image(draw_grid(pictures), run / "samples" / f"step_{state.step:06d}.png")
    return mean_of(rows)


# ----------------------------------------------------------------------------------------------------------------
# The run.

def prepare_run(args):
    """Make the run folder, or refuse to take one that is in use. -> its path and the log lines so far."""
    run, log = Path(args.out), []
    make_folder(run)
    if args.resume:
        for line in (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []:
            try:
                log.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the machine went down
    elif (run / "latest").exists() and not args.overwrite:
        raise UserError(f"{run} holds a run already: --resume continues it, --overwrite deletes it, --out names another")
    return run, log


def clear_run(run):
    """Delete the run that a folder holds."""
    for name in ("latest", "best", "log.jsonl", "loss.png"):
        (run / name).unlink(missing_ok=True)
    for old in (*run.glob(STEPS), run / "samples"):
        shutil.rmtree(old, ignore_errors=True)


def train_step(state, batch):
    """One optimizer step -> (loss, gradient norm)."""
    args = state.args
    generator = torch.Generator().manual_seed(seed_for(args.seed, state.step, "noise"))
    x0, condition = (state.autoencoder.encode(batch[key].to(args.device, non_blocking=True)) for key in ("clean", "condition"))
    noise = torch.randn(x0.shape, generator=generator).to(args.device)
    sigma = draw_sigma(len(x0), generator, args.share_at_one, state.restorer.shift).to(args.device)
    text, text_mask = (t.to(args.device) for t in state.prompts(batch["caption"]))

    progress = (state.step + 0.5) / args.steps
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * min(1, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))
    # A changed brightness leaves nothing in the image to tell it by: at full weight that error drowned all learning
    # (all six degradations, at sigma 25: 20.4 -> 20.4 dB after 1,600 steps, and 26.8 dB after 800 at weight 0.1).
    jitter = any(name == "color_jitter" for name, _ in parse_degradations(args.degradations))
    total, parts = 0.0, args.accumulate
    for p in state.parameters.values():
        p.grad = None
    for part in range(parts):  # every parts-th image: the gradient is the whole batch's
        at = slice(part, None, parts)
        loss = flow_loss(state.restorer, x0[at], condition[at], text[at], text_mask[at], sigma[at], noise[at], 0.1 if jitter else 1.0)
        if state.restorer.prediction == "residual":
            # the root of each image's error divides its gradient by that error: the images in the worst state, which
            # stay far from clean whatever the network does, then do not drown those that need a light touch
            loss = (loss + 1e-6).sqrt()
        loss = loss.mean() / parts
        loss.backward()
        total += loss.item()
    norm = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in state.parameters.values()]).norm().item()
    if math.isfinite(total + norm):
        state.update_weights(min(1.0, args.clip / (norm + 1e-6)))
    else:
        state.step += 1  # a step without an update
    return total, norm


def train(state, train_set, val_set, run, log):
    """Steps until args.steps or a signal, with log, validation and checkpoints. -> (last validation, that signal or None)."""
    args, start, stop = state.args, state.step, []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:  # the first asks for an end after this step, a second one ends it at once
        signal.signal(number, lambda number, _: (stop.append(number), signal.signal(number, handlers[number])))
    if not log:
        log.append({"step": state.step} | validate(state, val_set, run))
    validation = next(entry for entry in reversed(log) if "restored_psnr" in entry)
    write_text(run / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    losses, mean, speed, since, bad = [], math.nan, math.nan, time.monotonic(), 0
    with (tqdm(total=args.steps, initial=start, unit="step", smoothing=0.05, dynamic_ncols=True) as bar,
          open(run / "log.jsonl", "a", buffering=1) as log_file):
        for batch in make_loader(train_set, args, start):
            if isinstance(batch, UserError):
                if state.step > start:
                    state.save(run, validation)
                raise batch
            loss, norm = train_step(state, batch)
            bar.update()
            if math.isfinite(loss + norm):
                bad = 0
                losses.append(loss)
            else:
                bad += 1
                print(f"\nstep {state.step}: the loss is {loss}, the gradient norm {norm}: skipped", file=sys.stderr)
                if bad == 20:
                    state.save(run, validation)
                    raise UserError(f"20 steps in a row without a finite loss; the weights are saved, lower --lr ({args.lr:g})")
            last, entries = state.step == args.steps or bool(stop), []
            if state.step % 50 == 0 or last:
                speed, mean = len(losses) * args.batch_size / (time.monotonic() - since), sum(losses) / max(1, len(losses))
                entries.append({"step": state.step, "loss": mean, "norm": norm, "images_per_second": speed})
                losses, since = [], time.monotonic()
            pause = time.monotonic()
            if state.step % args.val_every == 0 or last:
                validation = {"step": state.step} | validate(state, val_set, run)
                entries.append(validation)
            if entries:
                bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} img/s, val {validation['restored_psnr']:.2f} dB")
            log += entries
            log_file.writelines(json.dumps(entry) + "\n" for entry in entries)
            if state.step % args.save_every == 0 or last:
                state.save(run, validation)
                draw_curve(log, run / "loss.png")
            since += time.monotonic() - pause
            if last:
                break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return validation, stop[0] if stop and state.step < args.steps else None


def main():
    args = parse_args()
    train_set, val_set = make_datasets(args)
    run, log = prepare_run(args)
    start = 0
    if not args.resume:
        config = describe_model(args)
    else:
        saved = read_json(find_checkpoint(run) / "config.json")
        config, start = saved["model"], saved["step"]
        if start >= args.steps:
            raise UserError(f"{run} is at step {start} of {args.steps} already; --steps sets a later end")
    autoencoder, prompts = build_surroundings(config, args.device)
    unit = autoencoder.factor * config["sana"].get("patch_size", 1)
    if args.resolution % unit:
        raise UserError(f"--resolution {args.resolution}: a multiple of {unit}, the model's unit")
    if prompts.folder:  # all captions of the run, before the transformer takes the memory
        draws = range(start * args.batch_size, args.steps * args.batch_size)
        prompts.prepare(["", *(train_set.plan(i)[2] for i in draws), *(val_set.plan(i)[2] for i in range(len(val_set)))])
    state = State(config, autoencoder, prompts, args)
    if args.resume:
        state.load(find_checkpoint(run))
        log = [entry for entry in log if entry["step"] <= state.step]
    elif (run / "latest").exists():  # --overwrite
        clear_run(run)
    write_text(run / "config.json", json.dumps({"model": state.config, "args": vars(args)}, indent=1))
    count = sum(p.numel() for p in state.parameters.values())
    where = f"on {args.device}" + ("" if torch.cuda.is_available() else " (no GPU here)")
    print(f"model {args.model}, {count / 1e6:.2f} M parameters, {where}: {args.steps - state.step} steps of "
          f"{args.batch_size} crops of {args.resolution} pixels from {len(train_set)} images -> {run}")
    validation, interrupted = train(state, train_set, val_set, run, log)
    print(f"{'interrupted at ' if interrupted else ''}step {state.step}, {len(val_set)} held-out images: "
          f"PSNR {validation['input_psnr']:.2f} -> {validation['restored_psnr']:.2f} dB, "
          f"SSIM {validation['input_ssim']:.3f} -> {validation['restored_ssim']:.3f}")
    print(f"pictures {run}/samples/step_{state.step:06d}.png (degraded | restored | clean), {run}/loss.png\n"
          f"log {run}/log.jsonl, checkpoint {find_checkpoint(run)}")
    if interrupted:
        print(f"python train.py --resume --out {run} goes on")
        sys.exit(128 + interrupted)


if __name__ == "__main__":
    run_script(main)
