"""Train an image restorer on pairs of clean and degraded images.

    python train.py                                          the built-in demo: procedural images, no files needed
    python train.py --data pairs/pairs.csv                   your own pairs (see data.py)
    python train.py --data photos.csv --degradations gaussian_noise:sigma=25
    python train.py --data pairs/pairs.csv --model sana1.5-1.6b      from pretrained SANA (the default on a GPU)
    python train.py --resume out/demo                        go on after Ctrl-C, as if never stopped
    torchrun --nproc_per_node=8 train.py --data pairs/pairs.csv --batch_size 32      the same steps, shared by eight GPUs

Writes to out/RUN: config.json, log.jsonl, loss.png, samples/ (degraded | restored | clean), checkpoints step_N/.
"""
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from data import (DATA_RANGES, CachedDataset, add_data_flags, build_surroundings, check_device, curriculum, describe_model, fingerprint,
                  make_datasets, make_loader, seed_for)
from degrade import (Parser, UserError, check_numbers, draw_grid, draw_panels, keep_freed_memory, make_folder, noted_signals, out_of_memory,
                     parse_degradations, reading, run_script, save_image, write_text)
from evaluate import BINS, DEFAULT_STEPS, Meter, evaluate_pairs, mean_loss, mean_of, restore
from model import PRESETS, build_restorer, draw_sigma, flow_loss, starting_point
from vae import find_checkpoint, is_run, load_weights, read_run, save_weights

# flags whose default depends on the model: pixels from scratch, or latents from pretrained weights
SCRATCH = {"lr": 5e-3, "steps": 8000, "resolution": 48, "share_at_one": 0.3, "clip": 0.2}
PRETRAINED = {"lr": 1e-5, "steps": 10000, "resolution": 512, "share_at_one": 0.0, "clip": 0.1}


def parse_args(argv=None):
    parser = Parser(__doc__)
    # what to train, and on what
    add_data_flags(parser)
    parser.add_argument("--cache", metavar="FOLDER", help="of python data.py cache with the same flags: no autoencoder and text encoder in memory")
    parser.add_argument("--curriculum", metavar="SIDE:STEPS,...", help="instead of --resolution and --steps, e.g. 512:8000,1024:2000")
    parser.add_argument("--conditioning", choices=["projection", "widen", "none"], help="how the degraded image enters: a 1x1 convolution in front, or a "
                        "patch embedding with twice the channels; none: not at all, to pretrain a text-to-image model (default: the preset's)")
    # optimization
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 8000 for tiny, 2500 for the demo, else 10000)")
    parser.add_argument("--batch_size", type=int, default=4, help="images in a step, over all processes (default 4)")
    parser.add_argument("--lr", type=float, help="peak; rises for 2%% of the steps, then falls as a cosine to 0 (default 5e-3 for tiny, else 1e-5)")
    parser.add_argument("--proj_lr", type=float, help="for --conditioning projection, that layer's (default 100 * lr, at most 0.05)")
    parser.add_argument("--optimizer", choices=["adamw", "adamw_bf16", "adamw_sr"], help="adamw: fp32, torch's. adamw_bf16: the same "
                        "steps with weights and moments in bf16 and the weights' lost bits beside them. adamw_sr: bf16 weights, "
                        "rounded stochastically (default: adamw_bf16 for pretrained models on a GPU, else adamw)")
    parser.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's (default 0)")
    parser.add_argument("--clip", type=float, help="largest gradient norm (default 0.2 for tiny, else 0.1, as SANA was trained)")
    parser.add_argument("--ema_decay", type=float, default=0.9999, help="of the averaged weights that are evaluated (default 0.9999)")
    parser.add_argument("--ema_every", type=int, default=1, metavar="K", help="average every K-th step, with decay^K (default 1)")
    parser.add_argument("--ema_device", help="where the averages lie; cpu spares a GPU 4 bytes a weight (default: --device)")
    parser.add_argument("--sigma_mean", type=float, default=0.0, help="training sigmas: sigmoid of a normal draw with this mean")
    parser.add_argument("--sigma_std", type=float, default=1.0, help="and this standard deviation, shifted (default 0 and 1, SANA's)")
    parser.add_argument("--share_at_one", type=float, help="share of training at sigma = 1, where one-step restoration happens (default 0.3 for tiny, else 0)")
    parser.add_argument("--condition_dropout", type=float, default=0.0, help="share without the degraded image, for evaluate.py --condition_guidance (default 0)")
    # time and memory
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N parts, for memory (default 1)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again for the gradient instead of keeping them")
    parser.add_argument("--compile", action=BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    # the run
    parser.add_argument("--out", help="run folder (default out/demo, or out/NAME for NAME.csv)")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="continue that run, or the one in --out; flags given now win")
    parser.add_argument("--overwrite", action="store_true", help="delete a run that --out holds already")
    parser.add_argument("--save_every", type=int, default=1000, metavar="STEPS", help="write a checkpoint this often (default 1000)")
    parser.add_argument("--keep", type=int, default=1, metavar="N", help="newest checkpoints to keep, beside the best by validation (default 1)")
    parser.add_argument("--val_every", type=int, default=500, metavar="STEPS", help="measure held-out images this often (default 500)")

    given = args = parser.parse_args(argv)
    args.out = args.resume if isinstance(args.resume, str) else args.out or f"out/{Path(args.data).stem if args.data else 'demo'}"
    if was_restarted(args.out):
        args.resume, args.overwrite = True, False
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run, --overwrite deletes it: give one of them")
    if args.resume:  # the run's own settings become the defaults
        saved = read_run(args.out)["args"]
        if not (Path(args.out) / "latest").is_file() or not saved:
            raise UserError(f"--resume {args.out}: give the run folder, which goes on from its newest checkpoint")
        if given.optimizer not in (None, saved.get("optimizer")):
            raise UserError(f"--optimizer {given.optimizer}: this run was begun with {saved.get('optimizer')}, whose state does not fit")
        if given.data:  # given again: as it is now
            saved.pop("data_digest", None)
        args = parser.parse_args(argv, Namespace(**saved | {"out": args.out, "resume": True, "overwrite": False}))
        args.out = args.resume if isinstance(args.resume, str) else args.out
    if args.curriculum and given.steps:
        raise UserError("--steps: --curriculum sets the number of steps; make that longer")
    args.job = JOB
    return fill_args(args)


def fill_args(args):
    """Defaults that depend on other flags. Raises UserError for a value that makes no sense."""
    cuda = args.device.startswith("cuda")
    args.model = args.model or ("sana1.5-1.6b" if args.data and cuda else "tiny")
    pixels = args.model in PRESETS or is_run(args.model) and bool(read_run(args.model)["model"].get("autoencoder"))
    if args.curriculum:
        stages = curriculum(args)
        args.steps, args.resolution = stages[-1][0] // args.batch_size, stages[0][1]
    for name, value in (SCRATCH | ({} if args.data else {"steps": 2500}) if pixels else PRETRAINED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.optimizer = args.optimizer or ("adamw_bf16" if not pixels and cuda else "adamw")
    args.compile = cuda if args.compile is None else args.compile
    counts = "steps", "batch_size", "save_every", "val_every", "accumulate", "keep", "ema_every"
    shares = "lr", "proj_lr", "ema_decay", "condition_dropout", "share_at_one"
    check_numbers(args, DATA_RANGES | dict.fromkeys(counts, (1, 10**9)) | dict.fromkeys(shares, (0, 1))
                  | {"weight_decay": (0, 100), "clip": (0, math.inf), "sigma_mean": (-10, 10), "sigma_std": (0, 10)})
    if args.batch_size % (args.accumulate * WORLD):
        raise UserError(f"--accumulate {args.accumulate} times {WORLD} processes: has to be a divisor of --batch_size {args.batch_size}")
    if args.cache and (args.curriculum or not args.data):
        raise UserError("--cache needs --data, and has one resolution: it cannot be combined with --curriculum")
    if cuda and WORLD > 1:  # before anything is put on the first GPU by all of them
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    check_device(args.device), check_device(args.ema_device or args.device, "ema_device")
    return args


# ----------------------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them: one a GPU, on one machine or several. Each computes its images of every batch.

RANK, WORLD, JOB = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("TORCHELASTIC_RUN_ID")


def was_restarted(run):
    """Whether torchrun has started the same command again, after a process or machine of the job died."""
    if WORLD == 1 or not (Path(run) / "latest").is_file():
        return False
    same = JOB != "none" and read_run(run)["args"].get("job") == JOB
    return same or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"


def join_others(args):
    """Meet the other processes, if there are any."""
    if WORLD > 1:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # after a restart, not the addresses of the dead
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo", store=store, rank=rank, world_size=world)
        sys.stdout = open(os.devnull, "w") if RANK > 0 else sys.stdout  # one speaks for all


def sum_over_all(numbers, device):
    """[float] of this process -> their sums over all processes."""
    if WORLD == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


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


def round_stochastically(x, seed, start=0):
    """fp32 -> bf16, up or down by chance so that the mean is x. seed: two int32. Chance is a hash (lowbias32) of each number's index, from start:
    integers that are compiled into one parallel pass with the rest, where a Generator draws one number after the other."""
    noise = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + start ^ seed[0]
    noise = (noise ^ noise >> 16 & 0xFFFF) * 0x7FEB352D + seed[1]
    noise = (noise ^ noise >> 15 & 0x1FFFF) * -0x7B935975  # its upper half is the better one
    return ((x.view(torch.int32) + (noise >> 16 & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)


class BF16AdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with fp32 arithmetic and little memory: a bf16 weight has its low 16 bits beside it (exact=True:
    the steps are fp32's, 2 + 2 bytes) or is rounded stochastically (exact=False: 2 bytes); moments are bf16, the second one
    rounded stochastically, because beta2 moves it by less than half an ulp. fp32 weights keep fp32 moments."""

    CHUNK = {"cpu": 1 << 16}  # weights at a time, not compiled: what a CPU's cache holds; else 2^24, for few launches

    def __init__(self, groups, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, exact=True, moments=torch.bfloat16, compile=False):
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": weight_decay})
        # compiled, one pass over memory instead of forty; it may round otherwise in the last place of fp32
        self.update, self.compiled = torch.compile(self._update, dynamic=True) if compile else self._update, compile
        for p in (p for group in self.param_groups for p in group["params"]):
            half = p.dtype == torch.bfloat16
            self.state[p] = {key: torch.zeros_like(p, dtype=moments if half else p.dtype) for key in ("exp_avg", "exp_avg_sq")}
            if half and exact:
                self.state[p]["low"] = torch.zeros_like(p, dtype=torch.int16)

    @torch.no_grad()
    def step(self, count, seeds, scale=1.0):
        """The count-th step (from 1). seeds: parameter -> seed of its rounding. scale: factor of the gradients (clipping)."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            numbers = 1 - lr * group["weight_decay"], -lr / (1 - beta1**count), math.sqrt(1 - beta2**count), float(scale)
            for p in group["params"]:
                seed = torch.randint(-2**31, 2**31, (4,), dtype=torch.int32, generator=torch.Generator().manual_seed(seeds[p])).to(p.device)
                now = torch.tensor(numbers, device=p.device)  # a tensor, because compiled code takes a number for a constant
                chunk = 1 << 24 if self.compiled else self.CHUNK.get(p.device.type, 1 << 24)
                for i, parts in enumerate(zip(*(t.view(-1).split(chunk) for t in (p.data, p.grad.contiguous(), *self.state[p].values())))):
                    self.update((beta1, beta2, group["eps"]), now, seed, torch.full((), i * chunk, dtype=torch.int32, device=p.device), *parts)

    @staticmethod
    def _update(constants, now, seed, start, weight, grad, exp_avg, exp_avg_sq, low=None):
        (beta1, beta2, eps), (decay, rate, correction, scale) = constants, now
        grad = grad.float() * scale
        w = weight if weight.dtype == torch.float32 else weight.float() if low is None else join_fp32(weight, low)
        m = exp_avg.float().lerp_(grad, 1 - beta1)
        v = exp_avg_sq.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        w.mul_(decay).add_(rate * m / (v.sqrt() / correction).add_(eps))
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v if exp_avg_sq.dtype == v.dtype else round_stochastically(v, seed[:2], start))
        if low is not None:
            for kept, new in zip((weight, low), split_fp32(w)):
                kept.copy_(new)
        elif w is not weight:
            weight.copy_(round_stochastically(w, seed[2:], start))


# ----------------------------------------------------------------------------------------------------------------
# State. A checkpoint holds everything that the next step depends on; randomness needs no state (see seed_for).

CURVES = {"loss": "training loss", "restored_psnr": "validation PSNR, dB", "condition_norm": "norm of the condition's weights"}
STEPS = "step_" + "[0-9]" * 6  # what a checkpoint folder is called


class State:
    """Weights, their moving average, AdamW's moments and the number of steps done; and what stands around them.

    Several processes: all have the weights; the average and the moments of a tensor are kept by the process that owns it,
    which alone receives its gradient, updates it and hands the new weight to the others (ZeRO stage 2, arXiv 1910.02054)."""

    def __init__(self, config, autoencoder, prompts, args):
        self.step, self.config, self.autoencoder, self.prompts, self.args = 0, config, autoencoder, prompts, args
        self.best = [-math.inf, None]  # validation PSNR, name of the checkpoint that had it
        if args.resume:  # load() fills it
            with torch.device("meta"):
                self.restorer = build_restorer(config)
            self.restorer.to_empty(device="cpu")
        else:
            self.restorer = starting_point(args.model, config, torch.Generator().manual_seed(seed_for(args.seed, 0, "weights")))
        self.restorer.to(args.device).train()
        self.restorer.sana.checkpointing = args.checkpointing
        self.parameters, self.owner, load = dict(self.restorer.named_parameters()), {}, [0] * WORLD
        for name, p in sorted(self.parameters.items(), key=lambda item: -item[1].numel()):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += p.numel()
        self.ema_device = args.ema_device or args.device
        self.ema = {name: p.detach().to(self.ema_device, torch.float32, copy=True) for name, p in self.parameters.items()
                    if self.owner[name] == RANK}
        if args.optimizer != "adamw":
            self.restorer.sana.to(torch.bfloat16)
        self.mine = {name: self.parameters[name] for name in self.ema}
        # the projection starts at 0 and has to travel to order 1: at the common rate it never arrives
        rates = {False: args.lr, True: min(100 * args.lr, 0.05) if args.proj_lr is None else args.proj_lr}
        groups = [{"params": [p for name, p in self.mine.items() if name.startswith("projection") == which], "peak": peak}
                  for which, peak in rates.items()]
        options = {"betas": (0.9, 0.99), "weight_decay": args.weight_decay}
        if args.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups, **options, fused=True)
            for p in self.mine.values():  # what its first step would do: now a checkpoint has all of it from the start
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        else:
            self.optimizer = BF16AdamW(groups, **options, exact=args.optimizer == "adamw_bf16", compile=args.compile)
            for name, p in self.mine.items():  # weights from scratch have low bits as well
                if "low" in self.optimizer.state[p]:
                    torch._foreach_copy_([p.data, self.optimizer.state[p]["low"]], split_fp32(self.ema[name].to(p.device)))
        if args.compile:
            for block in self.restorer.sana.transformer_blocks:
                block.compile(dynamic=False)

    def condition_norm(self):
        """The norm of the weights through which the condition enters: 0 before training."""
        weight = self.restorer.projection.weight if self.restorer.conditioning == "projection" else self.restorer.sana.patch_embed.proj.weight
        return weight.detach()[:, self.restorer.sana.config["out_channels"]:].float().norm().item()

    def fp32(self, p):
        """The exact value of a weight."""
        low = self.optimizer.state[p].get("low")
        return p.detach().float() if low is None else join_fp32(p.detach(), low)

    def share_gradients(self):
        """Add up each gradient at the process that owns the weight; the others drop theirs."""
        if WORLD > 1:
            for work in [dist.reduce(p.grad, self.owner[name], async_op=True) for name, p in self.parameters.items()]:
                work.wait()
            for name, p in self.parameters.items():
                p.grad = p.grad if name in self.mine else None

    def update_weights(self, scale):
        """One optimizer step with the gradients times scale, and the moving average's: ema <- decay * ema + (1 - decay) * weights.
        The decay warms up, so that the start is soon forgotten."""
        self.step += 1
        args = self.args
        if args.optimizer == "adamw":
            torch._foreach_mul_([p.grad for p in self.mine.values()], scale)
            self.optimizer.step()
        else:
            seeds = {p: seed_for(args.seed, self.step, f"rounding of {name}") for name, p in self.mine.items()}
            self.optimizer.step(self.step, seeds, scale)
        if WORLD > 1:
            for work in [dist.broadcast(p.data, self.owner[name], async_op=True) for name, p in self.parameters.items()]:
                work.wait()
        if self.step % args.ema_every == 0:
            decay = min(args.ema_decay, (1 + self.step) / (10 + self.step)) ** args.ema_every
            for name, p in self.mine.items():
                self.ema[name].lerp_(self.fp32(p).to(self.ema_device), 1 - decay)

    def gather(self, tensors, dtype=None, only=(torch.float32, torch.bfloat16)):
        """{name: tensor} of the weights that each process owns -> of all weights, in the first process (in the others, nothing
        more). dtype: what the tensors have, None for that of the weight. only: of weights of these dtypes."""
        for name, p in self.parameters.items():
            if self.owner[name] == 0 or RANK not in (0, self.owner[name]) or p.dtype not in only:
                continue
            part = tensors[name].to(p.device).contiguous() if RANK else torch.empty_like(p, dtype=dtype)
            # as bytes, which every backend can carry
            (dist.recv if RANK == 0 else dist.send)(part.detach().view(-1).view(torch.uint8), self.owner[name] if RANK == 0 else 0)
            if RANK == 0:
                tensors = tensors | {name: part.detach().cpu()}
        return tensors

    def averaged(self):
        """A Restorer with the EMA weights, for validation and samples (in the first process; None in the others)."""
        ema = self.gather(self.ema, torch.float32)
        if RANK > 0:
            return None
        with torch.device("meta"):
            restorer = build_restorer(self.config).eval()
        half = self.args.device.startswith("cuda")  # a CPU is slow in bf16
        restorer.load_state_dict({name: t.to(self.args.device, self.parameters[name].dtype if half else None) for name, t in ema.items()},
                                 assign=True)  # where nothing has to change: the averages themselves, not a copy
        return restorer

    def save(self, run, validation):
        """Write run/step_N beside and rename it into place, then point run/best at the one with the highest validation PSNR and
        run/latest at it, then delete all but these and the newest --keep. Raises UserError; what was there before stays."""
        ema, moments = self.gather(self.ema, torch.float32), {}
        for key in ("exp_avg", "exp_avg_sq", *["low"] * (self.args.optimizer == "adamw_bf16")):
            mine = {name: self.optimizer.state[p][key] for name, p in self.mine.items() if key in self.optimizer.state[p]}
            moments |= {f"{key}.{name}": value for name, value in self.gather(mine, *[torch.int16, (torch.bfloat16,)] * (key == "low")).items()}
        folder, latest = run / f"step_{self.step:06d}", run / "latest"
        if RANK > 0 or folder.is_dir() and latest.is_file() and latest.read_text() == folder.name:
            return
        partial = run / f".{folder.name}.partial"
        if validation["step"] == self.step and validation["restored_psnr"] >= self.best[0]:
            self.best = [validation["restored_psnr"], folder.name]
        config = {"step": self.step, "model": self.config, "args": vars(self.args), "validation": validation, "best": self.best}
        try:
            for old in (folder, *run.glob(".step_*.partial")):  # of a run that was killed
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir()
            save_weights(self.restorer.state_dict(), partial / "model.safetensors")
            save_weights(ema, partial / "ema.safetensors")
            save_weights(moments, partial / "optimizer.safetensors")
            write_text(partial / "config.json", json.dumps(config, indent=1))
            partial.rename(folder)
        except (OSError, UserError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            before = f"; {run / latest.read_text()} is whole" if latest.is_file() else ""
            raise UserError(f"cannot write checkpoint {folder}: {error}{before}") from None
        write_text(run / "best", self.best[1] or folder.name)
        write_text(latest, folder.name)
        for old in sorted(run.glob(STEPS))[:-self.args.keep]:
            if old.name not in (folder.name, self.best[1]):  # renamed first: half a checkpoint must not look like one
                with contextlib.suppress(OSError):
                    shutil.rmtree(old.rename(run / f".{old.name}.partial"))

    def load(self, folder):
        """The inverse of save. Raises UserError for a damaged checkpoint."""
        load_weights(self.restorer, folder / "model.safetensors")
        config = read_run(folder)
        with reading(folder / "optimizer.safetensors", "this checkpoint"):
            ema, moments = load_file(folder / "ema.safetensors"), load_file(folder / "optimizer.safetensors")
            self.step, self.best = config["step"], config["best"]
            for name, p in self.mine.items():
                self.ema[name].copy_(ema[name])
                for key, value in self.optimizer.state[p].items():
                    value.copy_(moments[f"{key}.{name}"]) if key != "step" else value.fill_(self.step)


def validate(state, dataset, run):
    """Fixed pairs, fixed noise, EMA weights -> {"val_loss", and the mean PSNR and SSIM of input and restored}; saves a sample grid."""
    restorer, result, args = state.averaged(), {}, state.args
    if RANK == 0:
        autoencoder = state.autoencoder or build_surroundings(state.config, args.device)[0]  # with a cache, it is only here now
        how = dict(restorer=restorer, autoencoder=autoencoder, prompts=state.prompts, seed=args.seed)
        rows, pictures = evaluate_pairs(dataset, {"restored": lambda i, item: restore(
            pixels=item["condition"][None].to(args.device), captions=[item["caption"]], steps=DEFAULT_STEPS[restorer.prediction], **how)[0].cpu()}, quiet=True)
        save_image(draw_grid(pictures), run / "samples" / f"step_{state.step:06d}.png")
        result = {"val_loss": mean_loss(dataset, rows, **how)} | mean_of(rows)
    box = [{"step": state.step} | result]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ----------------------------------------------------------------------------------------------------------------
# The run.

def prepare_run(args):
    """Make the run folder, or refuse to take one that is in use. -> its path and the log lines so far."""
    run, log = Path(args.out), []
    if RANK == 0:
        make_folder(run)
    if args.resume:
        with contextlib.suppress(FileNotFoundError, ValueError):  # a line that was being written when the machine went down
            log.extend(map(json.loads, open(run / "log.jsonl", encoding="utf-8")))
    elif RANK == 0 and (run / "latest").exists() and not args.overwrite:
        raise UserError(f"{run} holds a run already: --resume continues it, --overwrite deletes it, --out names another")
    return run, log


def train_step(state, batch):
    """One optimizer step -> (the losses of the batch by bin of sigma and how many there were, gradient norm, whether all was finite,
    how many unreadable images were passed over)."""
    args, parts = state.args, state.args.accumulate
    generator = torch.Generator().manual_seed(seed_for(args.seed, state.step, "noise"))
    x0, condition = (batch[key].to(args.device, non_blocking=True) for key in ("clean", "condition"))
    if not args.cache:
        x0, condition = (torch.cat([state.autoencoder.encode(part) for part in x.chunk(parts)]) for x in (x0, condition))
    state.grid = x0.shape[2:]
    # every process draws for the whole batch and takes its images: the same whoever computes them
    noise = torch.randn((args.batch_size, *x0.shape[1:]), generator=generator)[RANK::WORLD].to(args.device)
    sigma = draw_sigma(args.batch_size, generator, args.share_at_one, state.restorer.shift, args.sigma_mean, args.sigma_std)[RANK::WORLD]
    kept = (torch.rand(args.batch_size, generator=generator) >= args.condition_dropout)[RANK::WORLD]
    condition = condition * kept.to(args.device)[:, None, None, None]
    text, text_mask = (t.to(args.device) for t in state.prompts(batch["caption"]))
    if args.compile:  # few lengths, because each is compiled by itself
        more = -text.shape[1] % 32
        text, text_mask = F.pad(text, (0, 0, 0, more)), F.pad(text_mask, (0, more))
    progress = (state.step + 0.5) / args.steps
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * min(1, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))
    # A changed brightness leaves nothing in the image to tell it by: at full weight that error drowned all learning
    # (all six degradations, at sigma 25: 20.4 -> 20.4 dB after 1,600 steps, and 26.8 dB after 800 at weight 0.1).
    jitter = any(name == "color_jitter" for name, _ in parse_degradations(args.degradations))
    sums = torch.zeros(2, BINS)
    for part in range(parts):  # every parts-th image: the gradient is the whole batch's
        at = slice(part, None, parts)
        loss = flow_loss(state.restorer, x0[at], condition[at], text[at], text_mask[at], sigma[at].to(args.device), noise[at],
                         0.1 if jitter else 1.0)
        if state.restorer.prediction == "residual":
            # the root of each image's error divides its gradient by that error: the images in the worst state, which
            # stay far from clean whatever the network does, then do not drown those that need a light touch
            loss = (loss + 1e-6).sqrt()
        (loss.sum() / args.batch_size).backward()
        bins = (sigma[at] * BINS).long().clamp(max=BINS - 1)
        sums.index_add_(1, bins, torch.stack([loss.detach().float().cpu(), torch.ones(len(bins))]))
    state.share_gradients()
    square = sum(torch.linalg.vector_norm(p.grad, dtype=torch.float32).double().square() for p in state.mine.values())
    *sums, square, bad = sum_over_all([*sums.flatten().tolist(), square.item(), float(batch["bad"])], args.device)
    norm = math.sqrt(square)
    finite = math.isfinite(sum(sums) + norm)
    if finite:
        state.update_weights(min(1.0, args.clip / (norm + 1e-6)))
    else:
        state.step += 1  # a step without an update
        for moments in state.optimizer.state.values():
            moments |= {"step": moments["step"] + 1} if "step" in moments else {}
    for p in state.parameters.values():
        p.grad = None
    return sums, norm, finite, int(bad)


def train(state, loader, val_set, run, log):
    """Steps on the batches of loader until args.steps or a signal, with log, validation and checkpoints. -> (last validation, that signal or None).
    Raises UserError, with everything saved, where it cannot go on."""
    args, start, problem = state.args, state.step, None
    if not log:
        log.append(validate(state, val_set, run))
    validation, line = next(entry for entry in reversed(log) if "restored_psnr" in entry), {"loss": math.nan, "images_per_second": 0}
    if RANK == 0:
        write_text(run / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    meter, loader, norm, bad = Meter(state, WORLD), iter(loader), math.nan, 0
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the death of a worker shows where its batch is waited for, not amid an update
    with (noted_signals() as stop, tqdm(total=args.steps, initial=start, unit="step", smoothing=0.05, dynamic_ncols=True, disable=RANK > 0) as bar,
          open(run / "log.jsonl" if RANK == 0 else os.devnull, "a", buffering=1) as log_file):
        while True:
            batch = meter.wait_for(loader)
            problem = batch if isinstance(batch, UserError) else problem
            # all processes end together: after the last step, a signal to one of them, or what one could not do
            stopped, failed = sum_over_all([float(bool(stop)), float(bool(problem))], args.device)
            last, entries = batch is None or bool(stopped or failed), []
            pause = time.monotonic()
            if state.step > start and (state.step % 50 == 0 or last):
                entries.append(line := meter.entry(norm))
            if state.step > start and (state.step % args.val_every == 0 or last and not stopped + failed):  # after SIGTERM there is little time
                try:
                    validation = validate(state, val_set, run)
                except (UserError, MemoryError, RuntimeError):
                    if WORLD == 1:
                        state.save(run, validation)
                    raise
                entries.append(validation)
            if entries:
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} img/s, val {validation['restored_psnr']:.2f} dB")
            log += entries
            log_file.writelines(json.dumps(entry) + "\n" for entry in entries)
            if state.step > start and (state.step % args.save_every == 0 or last):
                state.save(run, validation)
                if RANK == 0:
                    draw_panels([(title, [(line["step"], line[key]) for line in log if key in line], key == "loss", None)
                                 for key, title in CURVES.items()], run / "loss.png")
            meter.since += time.monotonic() - pause
            if last:
                break
            try:
                sums, norm, finite, passed_over = train_step(state, batch)
            except (MemoryError, RuntimeError) as error:
                if WORLD > 1 or state.step > bar.n or not out_of_memory(error):  # others wait; or the weights are half updated
                    raise
                problem = UserError(out_of_memory(error))
                continue
            meter.count(sums, finite, passed_over)
            bar.update()
            bad = 0 if finite else bad + 1
            if bad:
                print(f"\nstep {state.step}: the loss is {sum(sums[:BINS])}, the gradient norm {norm}: skipped", file=sys.stderr)
            if bad == 20:
                problem = UserError(f"20 steps in a row without a finite loss; the weights are saved, lower --lr ({args.lr:g})")
    loader = None  # ends the workers
    sum_over_all([0.0], args.device)  # nobody leaves before the first one has saved
    if failed:
        raise problem or UserError("another process could not go on")
    return validation, (stop or [signal.SIGTERM])[0] if stopped and state.step < args.steps else None


def main():
    args = parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    join_others(args)
    stages = curriculum(args) if args.curriculum else None
    train_set, val_set = make_datasets(args, stages)
    digest = hashlib.sha256(repr((train_set.source.rows, train_set.rows, val_set.rows)).encode()).hexdigest() if args.data else None
    if getattr(args, "data_digest", digest) != digest:
        raise UserError(f"{args.data} is not what it was when this run began; --data {args.data} goes on with it as it is now")
    args.data_digest = digest
    config, start = None if args.resume else describe_model(args.model, args.conditioning), 0
    run, log = prepare_run(args)
    if args.resume:
        saved = read_run(run)
        config, start = saved["model"], saved["step"]
        if start >= args.steps:
            raise UserError(f"{run} is at step {start} of {args.steps} already; --steps sets a later end")
    autoencoder, prompts = build_surroundings(config, args.device)
    unit = autoencoder.factor * config["sana"].get("patch_size", 1)
    wrong = [side for _, side in stages or [(0, args.resolution)] if side % unit]
    if wrong:
        raise UserError(f"--resolution {wrong[0]}: a multiple of {unit}, the model's unit")
    draws = range(start * args.batch_size + RANK, args.steps * args.batch_size, WORLD)
    if args.cache:
        train_set, autoencoder = CachedDataset(args.cache, fingerprint(args, config), len(train_set)), None
        prompts.known = train_set.prompts
    elif prompts.folder:  # all captions of the run, before the transformer takes the memory
        ahead = range(draws.start, draws.stop + 2 * len(train_set)) if args.skip_bad else draws
        prompts.prepare(["", *(train_set.plan(i)[2] for i in ahead), *(val_set.plan(i)[2] for i in range(len(val_set)))])
    state = State(config, autoencoder, prompts, args)
    if args.resume:
        state.load(find_checkpoint(run))
        log = [entry for entry in log if entry["step"] <= state.step]
    sum_over_all([0.0], args.device)  # now all have read what the first one is about to write
    if RANK == 0:
        if not args.resume and (run / "latest").exists():  # --overwrite
            for old in ("latest", "best", "log.jsonl", "loss.png", "samples", *(path.name for path in run.glob(STEPS))):
                shutil.rmtree(run / old) if (run / old).is_dir() else (run / old).unlink(missing_ok=True)
        write_text(run / "config.json", json.dumps({"model": state.config, "args": vars(args)}, indent=1))
    count = sum(p.numel() for p in state.parameters.values())
    where = f"on {WORLD} x {args.device}" if WORLD > 1 else f"on {args.device}" + ("" if torch.cuda.is_available() else " (no GPU here)")
    print(f"model {args.model}, {count / 1e6:.2f} M parameters, {where}: {args.steps - state.step} steps of "
          f"{args.batch_size} crops of {args.curriculum or args.resolution} pixels from {len(train_set)} images -> {run}")
    validation, interrupted = train(state, make_loader(train_set, args, draws), val_set, run, log)
    print(f"{'interrupted at ' if interrupted else ''}step {state.step}, {len(val_set)} held-out images: "
          f"PSNR {validation['input_psnr']:.2f} -> {validation['restored_psnr']:.2f} dB, "
          f"SSIM {validation['input_ssim']:.3f} -> {validation['restored_ssim']:.3f}")
    print(f"pictures {run}/samples/step_{validation['step']:06d}.png (degraded | restored | clean), {run}/loss.png\n"
          f"log {run}/log.jsonl, checkpoint {run}/step_{state.step:06d}")
    if interrupted:
        print(f"python train.py --resume {run} goes on")
        sys.exit(128 + interrupted)


if __name__ == "__main__":
    run_script(main)
