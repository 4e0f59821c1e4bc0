"""Train an image restorer on pairs of clean and degraded pictures.

    python train.py                                   the demo: it draws its own pictures
    python train.py --data pairs/pairs.csv            your own pairs (see data.py)
    python train.py --data photos.csv --degradations gaussian_noise:sigma=25
    python train.py --data pairs/pairs.csv --model sana1.5-1.6b --out out/sana    from SANA
    python train.py --data pairs/pairs.csv --model out/sana --stage decoder --out out/decoder
                                                      its decoder, shown the degraded picture
    python train.py --resume out/demo                 go on after Ctrl-C, as if never stopped
    torchrun --nproc_per_node=8 train.py --data pairs/pairs.csv --batch_size 32 --out out/x --resume
                                                      the same steps, shared by eight GPUs

Writes to out/RUN: config.json, log.jsonl, loss.png, samples/ (degraded | restored | clean) and
checkpoints step_N/. The files latest and best name one of them.
"""
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# torch's threads wait for each other by spinning, which starves other programs, and so each other.
# Now they soon go to sleep instead. (OpenMP reads this when torch is imported.)
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

import data
import evaluate
import model
import vae
from data import check_device, seed_for
from degrade import Parser, UserError, between, explain_errors, given_flags, run_script, save_image

# Defaults that depend on the model and the stage. tiny works on pixels, mini on the latents of its
# own autoencoder; all other models are pretrained.
DEFAULTS = {
    ("tiny", "restorer"): {"lr": 5e-3, "steps": 12000, "batch_size": 8, "clip": 0.2},
    ("mini", "autoencoder"): {"lr": 2e-3, "steps": 4500, "batch_size": 8, "clip": 1.0},
    ("mini", "restorer"): {"lr": 2e-3, "steps": 4500, "batch_size": 8, "clip": 0.2},
    ("mini", "decoder"): {"lr": 2e-3, "steps": 3200, "batch_size": 8, "clip": 1.0},
    ("pretrained", "restorer"): {"lr": 1e-5, "steps": 10000, "batch_size": 4, "clip": 0.1},
    ("pretrained", "decoder"): {"lr": 1e-4, "steps": 10000, "batch_size": 4, "clip": 1.0},
}
DEMO_STEPS = 4000
OPTIMIZERS = ["adamw", "adamw_bf16", "adamw_sr"]  # fp32; bf16 exact; bf16 stochastic
STEP_FOLDERS = "step_[0-9]*"

# Several processes, as torchrun starts them: one a GPU, on one machine or several.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine: the number of its GPU


def make_parser():
    parser = Parser(__doc__, usage="python train.py [flags]")
    data.add_data_flags(parser)
    count, share, positive = between(int, 1), between(float, 0, 1), between(float, 0)
    add = parser.add_argument_group("model and optimizer").add_argument
    ways = ["projection", "widen", "none"]
    add("--conditioning", choices=ways, help="see model.Restorer (SANA: projection; tiny: widen)")
    add("--lora", type=count, metavar="RANK", help="train low-rank changes alone, see model.LoRA")
    least = between(float, 1e-3)
    add("--lora_alpha", type=least, help="their factor is lora_alpha / RANK (default RANK)")
    add("--steps", type=count, help="default: the demo 4000, tiny 12000, SANA 10000; see DEFAULTS")
    add("--batch_size", type=count, help="of all processes together (default 8; SANA 4)")
    add("--lr", type=share, help="peak rate (default 1e-5 for SANA, with LoRA 1e-4; see DEFAULTS)")
    add("--proj_lr", type=share, help="of the projection or the skips (see projection_lr)")
    add("--optimizer", choices=OPTIMIZERS, help="see BF16AdamW (default adamw; SANA on GPU: bf16)")
    add("--weight_decay", type=positive, default=0.0, help="AdamW's (default 0)")
    add("--clip", type=positive, help="largest gradient norm (default 0.1 for SANA; see DEFAULTS)")
    add("--ema_decay", type=share, default=0.9999, help="of the average (default 0.9999)")
    add("--ema_every", type=count, help="average every N steps (default 1; 10 if --ema_device cpu)")
    add("--ema_device", type=check_device, help="cpu spares a GPU 4 bytes a weight")
    add("--shift", type=between(float, 0.01, 100), help="of sigmas (default 3, or the model's)")
    mean = between(float, -10, 10)
    add("--sigma_mean", type=mean, default=0.0, help="mean logit (unshifted), see model.draw_sigma")
    add("--share_at_one", type=share, help="share at sigma = 1 (default 0 for SANA, else 0.3)")
    add("--condition_dropout", type=share, default=0.0, help="for --condition_guidance (default 0)")
    add = parser.add_argument_group("--stage autoencoder and decoder").add_argument
    add("--lpips_weights", nargs=2, metavar=("TRUNK", "HEADS"), help="local files: adds 0.1 LPIPS")
    parts = ["both", "skips", "decoder"]
    add("--decoder_parts", choices=parts, help="what is trained (default both)")
    add = parser.add_argument_group("time and memory").add_argument
    add("--curriculum", type=parse_curriculum, metavar="SIDE:STEPS,...", help="512:8000,1024:2000")
    add("--cache", metavar="FOLDER", help="of python data.py cache, with the same data flags")
    text = "compute a batch in so many parts (default 1; one by one in SANA's --stage decoder)"
    add("--accumulate", type=count, help=text)
    add("--checkpointing", action="store_true", help="compute activations twice to save memory")
    add("--compile", action=BooleanOptionalAction, help="torch.compile (default: off)")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="run folder (default out/demo, or out/NAME for NAME.csv)")
    add("--resume", nargs="?", const=True, metavar="RUN", help="go on with it (none yet: begin)")
    add("--overwrite", action="store_true", help="delete a run that --out holds already")
    add("--save_every", type=count, default=1000, help="steps between checkpoints (default 1000)")
    add("--val_every", type=count, default=500, help="steps between validations (default 500)")
    return parser


def parse_args(argv=None):
    """Read the flags. With --resume the run's own are the defaults. Raises UserError."""
    parser = make_parser()
    given = args = parser.parse_args(argv)  # None is a flag that was not given
    out = args.out or f"out/{Path(args.data).stem if args.data else 'demo'}"
    if isinstance(args.resume, str):
        out = args.resume
        if not (Path(out) / "latest").is_file():
            where = f"no run in {Path(out).resolve()}"
            raise UserError(f"--resume {out}: {where}; give the folder that --out named")
        if args.out not in (None, out):
            raise UserError("--out and --resume name two folders; --resume goes on in its own")
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run, --overwrite deletes it: give one of them")
    if args.resume and (Path(out) / "latest").is_file():
        # what is given again overrides it
        args = parser.parse_args(argv, Namespace(**saved_flags(out, given)))
        try:
            check_device(args.device)  # a saved one may not be here
        except ArgumentTypeError as error:
            raise UserError(f"--device {error}; give --device") from None
    args.out = out
    args.resume = given.resume
    args.overwrite = given.overwrite
    if args.curriculum and given.steps:
        raise UserError("--steps: --curriculum sets the number of steps; make that longer")
    fill_defaults(args)
    check_flags(args)
    return args


def saved_flags(out, given):
    """Return the flags saved by the run in folder out: {name: value}. Raises UserError.

    given: the flags of this command. A saved value that was derived from a flag given again becomes
    None, to be derived anew."""
    config = model.read_run(out)
    saved = config["args"]
    about = model.MODEL_DEFAULTS | config["model"]
    begun = saved | {"conditioning": about["conditioning"], "shift": about["shift"]}
    if "validated_on" not in config or saved.keys() - vars(given).keys():
        older = "made by another version; evaluate.py still restores with it"
        raise UserError(f"--resume {out}: {older}")
    kept = ["model", "vae", "stage", "conditioning", "lora", "lora_alpha", "optimizer"]
    for name in [*kept, "decoder_parts", "shift"]:
        if getattr(given, name) not in (None, begun.get(name)):
            raise UserError(f"--{name}: {out} was begun with {begun.get(name)} and keeps it")
    if given.lr and saved["proj_lr"] == projection_lr(Namespace(**saved)):
        saved["proj_lr"] = None  # it follows from --lr
    if "--device" in given_flags() and saved["ema_device"] == saved["device"]:
        saved["ema_device"] = None  # it follows from it
    return saved


def family_of(name):
    """Say whether --model name is "tiny", "mini" (or a run of them), or "pretrained"."""
    if model.is_run(name):
        config = model.read_run(name)["model"]
        return config["name"] if config["autoencoder"] else "pretrained"
    return name if name in model.PRESETS else "pretrained"


def defaults_of_model(args):
    """Return {flag: default} by model and stage."""
    family = family_of(args.model)
    scratch = family != "pretrained"
    # what has no defaults is refused by describe_model
    defaults = dict(DEFAULTS.get((family, args.stage), DEFAULTS[family, "restorer"]))
    defaults["resolution"] = data.RESOLUTIONS.get(family, data.RESOLUTION)
    defaults["share_at_one"] = 0.3 if scratch else 0.0
    if args.lora and not scratch:
        defaults["lr"] *= 10  # LoRA: few weights, and their product starts at 0
    if scratch and model.stage_of(args.model) == args.stage and not args.lora:
        defaults["lr"] /= 10  # at the peak it would forget what it has learnt
        if args.lr is None and RANK == 0:
            print(f"--model {args.model} is trained already: --lr {defaults['lr']:g}, a tenth")
    if family == "tiny" and not args.data:
        defaults["steps"] = DEMO_STEPS
    defaults["accumulate"] = 1
    if (family, args.stage) == ("pretrained", "decoder"):  # 4.6 GB an image of 512 pixels
        defaults["accumulate"] = max(1, (args.batch_size or defaults["batch_size"]) // WORLD)
    half = args.device.startswith("cuda") and not scratch and args.stage == "restorer"
    defaults["optimizer"] = "adamw_bf16" if half and not args.lora else "adamw"
    return defaults


def fill_defaults(args):
    """Set the defaults that depend on other flags."""
    args.stage = args.stage or "restorer"
    args.model = args.model or data.default_model(args)
    args.decoder_parts = args.decoder_parts or "both"
    inherit_lora(args)
    defaults = defaults_of_model(args)
    defaults["ema_device"] = args.device
    # compiled linear attention gave NaN gradients in bf16 on CPUs, and is untested on GPUs
    defaults["compile"] = False
    if args.curriculum:
        args.steps = sum(steps for _, steps in args.curriculum)
        args.resolution = args.curriculum[0][0]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.ema_every is None:  # every weight has to travel to the CPU
        args.ema_every = 10 if args.ema_device == "cpu" and args.device != "cpu" else 1
    if args.proj_lr is None:
        args.proj_lr = projection_lr(args)
    if args.lora and args.lora_alpha is None:
        args.lora_alpha = float(args.lora)


def inherit_lora(args):
    """Keep rank and alpha when --model is a LoRA run, to train it further."""
    if not args.lora and args.stage == "restorer" and model.stage_of(args.model) == "restorer":
        lora = model.read_run(args.model)["model"].get("lora")
        if lora:
            args.lora, args.lora_alpha = lora["rank"], lora["alpha"]


def projection_lr(args):
    """Return the learning rate of the projection or the skips: new weights that start at 0.

    Those of the projection have to grow to about 1, those of the skips to about 0.1."""
    if args.stage == "decoder":
        return min(10 * args.lr, 5e-3)
    if args.lora:  # whose own rate is ten times the whole network's
        return min(10 * args.lr, 0.05)
    return min(100 * args.lr, 0.05)


def check_flags(args):
    """Raise UserError for flags that do not go together."""
    refuse_idle_flags(args)
    if args.batch_size % (args.accumulate * WORLD):
        parts = f"--accumulate {args.accumulate} times {WORLD} processes"
        raise UserError(f"{parts}: has to be a divisor of --batch_size {args.batch_size}")
    if args.cache and (args.curriculum or not args.data):
        raise UserError("--cache needs --data, and has one resolution: no --curriculum")
    given = given_flags()
    if args.curriculum and "--resolution" in given:
        raise UserError("--resolution: --curriculum sets the sides; leave it out")
    only_data = {"--val_data", "--skip_bad"} & given
    if only_data and not args.data:
        raise UserError(f"{sorted(only_data)[0]}: the demo draws its own pictures; give --data")


FLOW = ["--conditioning", "--shift", "--sigma_mean", "--share_at_one", "--condition_dropout"]
FLOW += ["--checkpointing", "--compile", "--no-compile", "--lora", "--lora_alpha"]
IDLE = {  # stage: flags that have no effect there
    "autoencoder": [*FLOW, "--proj_lr", "--latent_steps", "--decoder_parts", "--cache", "--vae"],
    "restorer": ["--lpips_weights", "--latent_steps", "--decoder_parts"],
    "decoder": FLOW,
}
IDLE["autoencoder"] += ["--caption_dropout", "--degradations", "--max_degradations"]


def refuse_idle_flags(args):
    """Raise UserError for a flag that has no effect in this stage."""
    idle = given_flags().intersection(IDLE[args.stage])
    if idle:
        raise UserError(f"{sorted(idle)[0]}: it has no effect with --stage {args.stage}")
    if args.optimizer != "adamw" and (args.stage != "restorer" or args.lora):
        what = "--lora" if args.lora else f"--stage {args.stage}"
        raise UserError(f"--optimizer {args.optimizer}: {what} trains fp32 weights")
    if args.lora_alpha and not args.lora:
        raise UserError("--lora_alpha: give --lora RANK too")


def parse_curriculum(text):
    """argparse type: "512:8000,1024:2000" -> [(512, 8000), (1024, 2000)]."""
    stages = []
    for part in text.split(","):
        side, _, steps = part.partition(":")
        try:
            stages.append((between(int, 1, 2**14)(side), between(int, 1)(steps)))
        except ValueError:
            raise ArgumentTypeError(f"{text}: write SIDE:STEPS, as in 512:8000,1024:2000") from None
    return stages


# --------------------------------------------------------------------------------------------------
# Several processes. FSDP2 (fully_shard) gives each one some rows of every weight, its gradient, its
# moments and its average, and gathers a block's weights while it is computed.


def start_processes(args):
    """Meet the other processes, if there are any. Only the first one's output is shown."""
    if WORLD > 1:
        if ":" in args.device:
            raise UserError(f"--device {args.device}: each process takes its own; give cuda")
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # on one machine
            # the store outlives a restart: a new prefix hides the addresses of dead processes
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if args.device.startswith("cuda") else "gloo"
        group = {"store": store, "rank": rank, "world_size": world}
        # they wait while the first one validates and saves
        dist.init_process_group(backend, timeout=timedelta(hours=2), **group)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open to the end


def shard_module(module, device):
    """Spread the weights over the processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (WORLD,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    units = []
    if isinstance(module, model.Restorer):
        units += module.sana.transformer_blocks
        if module.conditioning == "projection":
            units.append(module.projection)  # fp32, where the rest may be bf16
    frozen = {p for p in module.parameters() if not p.requires_grad}  # each process has them whole
    for unit in [*units, module]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=frozen)


def shard(whole):
    """Return this process's rows of a tensor, as fully_shard cuts it."""
    rows = rows_of_each(whole)
    return whole[RANK * rows : (RANK + 1) * rows]


def rows_of_each(whole):
    return -(-len(whole) // WORLD)


def gather(part, weight):
    """Return the whole tensor on rank 0, None on the others. Every process must call it.

    part: this process's shard, laid out as that of weight. With one process, return part."""
    if WORLD == 1:
        return part
    from torch.distributed.tensor import DTensor

    bits = part.view(torch.bfloat16) if part.dtype == torch.int16 else part  # NCCL has no int16
    layout = {"shape": weight.shape, "stride": weight.stride()}
    bits = bits.to(weight.device)
    whole = DTensor.from_local(bits, weight.device_mesh, weight.placements, **layout)
    whole = whole.full_tensor().view(part.dtype)
    return whole.cpu() if RANK == 0 else None


def sum_over_processes(numbers, device):
    """[float] of this process -> their sums over all processes."""
    if WORLD == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


# --------------------------------------------------------------------------------------------------
# AdamW in bf16. At a learning rate of 1e-5 a step is far below half a unit in the last place of a
# bf16 weight: rounded to the nearest, nearly all of it would be lost.


def split_fp32(weight):
    """fp32 -> nearest bf16, and as int16 what the fp32 bits have beyond it. Nothing is lost.

    bf16 is the upper half of fp32's bits: 0x3F80_9000 is 0x3F81 and -0x7000."""
    bits = weight.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_fp32(high, low):
    """Invert split_fp32."""
    return ((high.view(torch.int16).int() << 16) + low).view(torch.float32)


def round_stochastically(x, seed, start=0):
    """Round fp32 to bf16, randomly up or down, so that the expected value is x.

    seed: int32 [2]. start: index of the first number. The random bits are a hash (lowbias32) of
    each index. Unlike a Generator, which draws one by one, a hash compiles into one parallel pass
    with the rest of the update."""
    noise = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + start
    noise = noise ^ seed[0]
    noise = (noise ^ ((noise >> 16) & 0xFFFF)) * 0x7FEB352D + seed[1]
    noise = (noise ^ ((noise >> 15) & 0x1FFFF)) * -0x7B935975       # its upper half is the better
    bits = x.view(torch.int32) + ((noise >> 16) & 0xFFFF)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


MOMENTS = "exp_avg", "exp_avg_sq"


def adamw_update(weight, low, grad, exp_avg, exp_avg_sq, seed, start, numbers, betas, eps):
    """Do one AdamW step (arXiv 1711.05101) of a flat piece of a tensor, in place, in fp32.

    weight, exp_avg, exp_avg_sq: bf16 or fp32, [n]. low: int16 [n], the bits that the bf16 weight
    lacks, or None. seed: int32 [4]; start: index of the first weight, for stochastic rounding.
    numbers: a tensor of four, because compiled code would take Python numbers for constants:
    1 - lr * weight decay, -lr / (1 - beta1^t), sqrt(1 - beta2^t), the factor of the gradient."""
    decay, rate, correction, scale = numbers
    seed_of_moment, seed_of_weight = seed[:2], seed[2:]
    if low is not None:
        w = join_fp32(weight, low)
    else:
        w = weight.float()  # of fp32, the weight itself
    g = grad.float() * scale
    m = exp_avg.float().lerp_(g, 1 - betas[0])
    v = exp_avg_sq.float().mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    w.mul_(decay).add_(rate * m / (v.sqrt() / correction).add_(eps))
    exp_avg.copy_(m)
    if exp_avg_sq.dtype == torch.bfloat16:  # a step often moves it by less than half a unit
        v = round_stochastically(v, seed_of_moment, start)
    exp_avg_sq.copy_(v)
    if low is not None:
        high, rest = split_fp32(w)
        weight.copy_(high)
        low.copy_(rest)
    elif weight.dtype == torch.bfloat16:
        weight.copy_(round_stochastically(w, seed_of_weight, start))


class BF16AdamW:
    """AdamW for bf16 weights, with fp32 arithmetic and little memory ("adamw_bf16", "adamw_sr").

    groups: [{"params": [...], "lr": float}], plain tensors with a gradient. exact True: store the
    low 16 bits of each bf16 weight too, so that weights step as in fp32 (2 + 2 bytes per weight).
    False: round the weight stochastically (2 bytes). moments: their dtype for bf16 weights; fp32
    weights have fp32 moments."""

    betas = 0.9, 0.99
    eps = 1e-8

    def __init__(self, groups, weight_decay=0.0, exact=True, moments=torch.bfloat16, compile=False):
        self.param_groups = groups
        self.weight_decay = weight_decay
        # Compiled: one pass over memory instead of forty. fp32's last bit may round differently.
        self.update = torch.compile(adamw_update, dynamic=True) if compile else adamw_update
        self.state = {}
        for p in [p for group in groups for p in group["params"]]:
            half = p.dtype == torch.bfloat16
            dtype = moments if half else p.dtype
            self.state[p] = {key: torch.zeros_like(p, dtype=dtype) for key in MOMENTS}
            if half and exact:
                self.state[p]["low"] = torch.zeros_like(p, dtype=torch.int16)

    @torch.no_grad()
    def step(self, count, seeds, scale=1.0, starts=None):
        """Do the count-th step (from 1). scale: factor of the gradients, for clipping.

        seeds: parameter -> seed of its rounding. starts: parameter -> index of its first weight in
        the whole tensor, if it is a part of one."""
        starts = starts or {}
        for group in self.param_groups:
            decay = 1 - group["lr"] * self.weight_decay
            rate = -group["lr"] / (1 - self.betas[0] ** count)
            correction = math.sqrt(1 - self.betas[1] ** count)
            for p in group["params"]:
                numbers = torch.tensor([decay, rate, correction, scale], device=p.device)
                self.step_tensor(p, seeds[p], numbers, starts.get(p, 0))

    def step_tensor(self, p, seed, numbers, first):
        """Update a tensor in pieces: what a CPU's cache holds, or 2^24 weights for few launches."""
        generator = torch.Generator().manual_seed(seed)
        limits = -(2**31), 2**31
        seed = torch.randint(*limits, (4,), dtype=torch.int32, generator=generator).to(p.device)
        state = self.state[p]
        low = state["low"].view(-1) if "low" in state else None
        weight, grad = p.detach().view(-1), p.grad.contiguous().view(-1)
        exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        cached = p.device.type == "cpu" and self.update is adamw_update
        size = 2**16 if cached else 2**24
        for i in range(0, len(weight), size):
            piece = slice(i, i + size)
            start = torch.full((), first + i, dtype=torch.int32, device=p.device)
            self.update(
                weight[piece],
                None if low is None else low[piece],
                grad[piece],
                exp_avg[piece],
                exp_avg_sq[piece],
                seed,
                start,
                numbers,
                self.betas,
                self.eps,
            )


# --------------------------------------------------------------------------------------------------
# State: what the next step depends on. Randomness needs none (see seed_for).


def prepare_restorer(restorer, config, args):
    """Cast a restorer as it is trained, and set what saves memory or time."""
    restorer.sana.checkpointing = args.checkpointing
    if args.optimizer != "adamw":
        restorer.sana.to(torch.bfloat16)
    if config["lora"] and args.device.startswith("cuda"):
        for p in restorer.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()
    if args.compile:
        for block in restorer.sana.transformer_blocks:
            block.compile(dynamic=False)


class State:
    """The weights, their moving average, AdamW's moments, and the number of steps done.

    config: "model" of config.json. module: built from config, a Restorer, or the autoencoder in the
    other stages. Parameters without a gradient are never updated. Three dicts map the name of each
    trained weight to a tensor:
    weights  the module's parameter; with several processes a DTensor, which FSDP gathers.
    parts    this process's shard, a plain tensor that the optimizer updates in place. With one
             process it is the weight itself.
    ema      the moving average of the shard, fp32.
    The optimizer's state is keyed by part: the moments, and "low", the remainder of split_fp32."""

    def __init__(self, config, module, args):
        self.config = config
        self.args = args
        self.step = 0
        self.draws = 0  # pictures drawn for them
        self.held_out = []  # names of the rows that are held out
        self.validated_on = ""  # all that best depends on beside the weights, hashed
        self.mean_weight = 1.0  # see model.flow_loss
        self.consistent = True  # False while an update is under way
        self.validation = None  # the last line of validate()
        self.best = [-math.inf, None]  # validation PSNR, name of the checkpoint that had it
        self.score = "roundtrip_psnr" if config["stage"] == "autoencoder" else "restored_psnr"
        self.module = module
        self.lanes = count_lanes(config, args)
        self.pool = None
        if self.lanes > 1:
            threads = torch.get_num_threads() // self.lanes
            self.pool = ThreadPoolExecutor(self.lanes, initializer=begin_lane, initargs=[threads])
        weights = vae.trained_weights(module)
        fp32 = {name: shard(p.detach()).float().clone() for name, p in weights.items()}
        if isinstance(module, model.Restorer):
            prepare_restorer(module, config, args)
        module.to(args.device)
        if WORLD > 1:
            shard_module(module, args.device)
        self.weights = vae.trained_weights(module)
        self.parts = dict(self.weights)
        if WORLD > 1:
            self.parts = {name: p.detach().to_local() for name, p in self.weights.items()}
        self.ema = {name: t.to(args.ema_device) for name, t in fp32.items()}
        self.optimizer = self.make_optimizer(args)
        for name, part in self.parts.items():  # what the cast to bf16 took away
            if "low" in self.optimizer.state[part]:
                high, low = split_fp32(fp32[name])
                part.detach().copy_(high)  # it rounds ties away from 0, the cast to even
                self.optimizer.state[part]["low"].copy_(low)

    def make_optimizer(self, args):
        groups = [
            {"params": [], "lr": args.lr, "peak": args.lr},
            {"params": [], "lr": args.proj_lr, "peak": args.proj_lr},
        ]
        for name, p in self.parts.items():
            new = name.startswith(("projection", "skips"))
            group = groups[1] if new else groups[0]
            group["params"].append(p)
        if args.optimizer != "adamw":
            exact = args.optimizer == "adamw_bf16"
            return BF16AdamW(groups, args.weight_decay, exact, compile=args.compile)
        options = {"betas": BF16AdamW.betas, "weight_decay": args.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(groups, **options)
        for p in self.parts.values():  # as its first step would: so load() finds where to copy to
            optimizer.state[p] = {key: torch.zeros_like(p) for key in MOMENTS}
            optimizer.state[p]["step"] = torch.zeros((), device=p.device)
        return optimizer

    def condition_norm(self):
        """Return the norm of the weights through which the condition enters.

        It is 0 in a new layer, except where Sana.initialize fills it (a preset with "widen")."""
        parts = {name: p.detach() for name, p in self.parts.items()}
        chosen = [p for name, p in parts.items() if name.startswith("skips")]
        if self.config["stage"] == "restorer":
            channels = self.module.sana.config["out_channels"]
            if self.module.conditioning == "projection":
                chosen = [parts["projection.weight"][:, channels:]]
            if self.module.conditioning == "widen":
                chosen = [parts["sana.patch_embed.proj.weight"][:, channels:]]
        square = sum(p.float().square().sum().item() for p in chosen)
        return math.sqrt(sum_over_processes([square], self.args.device)[0])

    def averaged_module(self):
        """Make a module with the averaged weights, in the first process; None in the others."""
        tensors = dict(self.module.named_buffers())
        for name, p in self.module.named_parameters():
            tensors[name] = gather(self.ema[name], p) if name in self.weights else p
        if RANK > 0:
            return None
        with torch.device("meta"):
            module = build_module(self.config)
        for name, p in self.module.named_parameters():
            half = p.dtype == torch.bfloat16 and self.args.device.startswith("cuda")
            dtype = torch.bfloat16 if half else torch.float32
            tensors[name] = tensors[name].to(self.args.device, dtype)
        module.load_state_dict(tensors, assign=True)  # on one device: the averages, not a copy
        return module.eval().requires_grad_(False)

    def update(self, scale):
        """Do one optimizer step with the gradients times scale, and average the weights."""
        args = self.args
        self.consistent = False
        self.count_step()
        if args.optimizer == "adamw":
            torch._foreach_mul_([p.grad for p in self.parts.values()], scale)
            self.optimizer.step()
        else:
            seeds, starts = {}, {}
            for name, p in self.parts.items():
                seeds[p] = seed_for(args.seed, self.step, f"rounding of {name}")
                whole = self.weights[name]
                starts[p] = RANK * rows_of_each(whole) * math.prod(whole.shape[1:])
            self.optimizer.step(self.step, seeds, scale, starts)
        if self.step % args.ema_every == 0:
            self.update_ema()
        self.consistent = True

    def update_ema(self):
        """ema <- decay * ema + (1 - decay) * weights.

        The decay warms up, so that the start is soon forgotten."""
        args = self.args
        decay = min(args.ema_decay, (1 + self.step) / (10 + self.step)) ** args.ema_every
        for name, p in self.parts.items():
            low = self.optimizer.state[p].get("low")
            weight = p.detach().float() if low is None else join_fp32(p.detach(), low)
            self.ema[name].lerp_(weight.to(args.ema_device), 1 - decay)

    def collect_gradients(self):
        """Give each part its gradient -> the square of this process's norm."""
        norms = []
        for name, part in self.parts.items():
            if WORLD > 1:
                part.grad = self.weights[name].grad.to_local()
            norms.append(torch.linalg.vector_norm(part.grad, dtype=torch.float32))
        return sum(norm**2 for norm in torch.stack(norms).tolist())

    def clear_gradients(self):
        for name, part in self.parts.items():
            part.grad = None
            self.weights[name].grad = None

    def skip(self):
        """Count a step without an update."""
        self.count_step()
        for moments in self.optimizer.state.values():
            if "step" in moments:
                moments["step"] += 1

    def count_step(self):
        self.step += 1
        self.draws += self.args.batch_size

    def save(self, run):
        """Write run/step_N, then update run/best and run/latest. Every process must call it.

        The folder is written under a temporary name, then renamed. The newest and the best
        checkpoint are kept, and those that another run builds on; all others are deleted. Raises
        UserError if it cannot be written; older checkpoints then stay."""
        tensors = {"model": {}, "ema": {}, "optimizer": {}}
        for name, p in self.weights.items():
            tensors["model"][name] = gather(self.parts[name].detach(), p)
            tensors["ema"][name] = gather(self.ema[name], p)
            for key, value in self.optimizer.state[self.parts[name]].items():
                if key != "step":
                    tensors["optimizer"][f"{key}.{name}"] = gather(value, p)
        folder, latest = run / f"step_{self.step:06d}", run / "latest"
        saved = folder.is_dir() and latest.is_file() and latest.read_text() == folder.name
        if RANK > 0 or saved:  # saved: the last step was one of --save_every as well
            return
        psnr = self.validation[self.score]
        if self.validation["step"] == self.step and psnr >= self.best[0]:  # of these very weights
            self.best = [psnr, folder.name]
        config = {
            "step": self.step,
            "draws": self.draws,
            "model": self.config,
            "args": vars(self.args),
            "held_out": self.held_out,
            "validated_on": self.validated_on,
            "validation": self.validation,
            "best": self.best,
        }
        partial = run / f".{folder.name}.partial"
        try:
            for old in [folder, *run.glob(".step_*.partial")]:  # of a run that was killed
                shutil.rmtree(old, ignore_errors=True)
            for name, weights in tensors.items():
                vae.save_weights(weights, partial / f"{name}.safetensors")
            vae.write_text(partial / "config.json", json.dumps(config, indent=1))
            partial.rename(folder)
        except (OSError, UserError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {folder}: {error}") from None
        vae.write_text(run / "best", self.best[1] or folder.name)
        vae.write_text(latest, folder.name)
        for old in run.glob(STEP_FOLDERS):
            if old.name not in (folder.name, self.best[1]) and not (old / "base").exists():
                with contextlib.suppress(OSError):  # Windows, while another program reads it
                    half = old.rename(run / f".{old.name}.partial")  # never half a step_N
                    shutil.rmtree(half, ignore_errors=True)

    def load(self, folder):
        """Load step, scores, averages and moments from a checkpoint, but not the weights.

        Raises UserError for a damaged checkpoint."""
        config = model.read_run(folder)
        self.step = config["step"]
        self.draws = config["draws"]
        self.best = config["best"]
        self.validation = config["validation"]
        with explain_errors(folder / "optimizer.safetensors", "this checkpoint"):
            ema = load_file(folder / "ema.safetensors")
            moments = load_file(folder / "optimizer.safetensors")
            for name, p in self.parts.items():
                self.ema[name].copy_(shard(ema[name]))
                for key, value in self.optimizer.state[p].items():
                    if key == "step":
                        value.fill_(self.step)
                    else:
                        value.copy_(shard(moments[f"{key}.{name}"]))


# --------------------------------------------------------------------------------------------------
# The loop and its parts.

BINS = 4  # of sigma, in which the loss is logged
LOG_EVERY = 50
MOST_FAILURES = 20  # steps in a row without a finite loss


def get_lr(step, steps, peak):
    """Return the learning rate: a warm-up over 2% of the steps, times a cosine over all of them."""
    progress = (step + 0.5) / steps
    return peak * min(1, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))


def draw_step(shape, step, args, shift):
    """Draw a step's random numbers for this process's b pictures.

    Return noise [b, *shape], sigma [b], and kept [b] bool: False where the condition is dropped.
    Every process draws for the whole batch and takes its share, so the numbers of a picture do not
    depend on how many processes there are."""
    generator = torch.Generator().manual_seed(seed_for(args.seed, step, "noise"))
    noise = torch.randn((args.batch_size, *shape), generator=generator)
    sigma = model.draw_sigma(args.batch_size, generator, args.share_at_one, shift, args.sigma_mean)
    kept = torch.rand(args.batch_size, generator=generator) >= args.condition_dropout
    mine = slice(RANK, None, WORLD)
    return noise[mine], sigma[mine], kept[mine]


@dataclass
class Frozen:
    """The frozen models that training uses.

    autoencoder  None with a cache, which holds latents already, and in --stage autoencoder
    prompts      captions -> embeddings
    restorer     in --stage decoder without a cache: makes the latents
    perceptual   LPIPS, if its weights were given"""

    autoencoder: object
    prompts: object
    restorer: object = None
    perceptual: object = None


def restorer_objective(state, batch, frozen):
    """Prepare a batch. Return (objective, sigma [B]).

    objective: takes a slice of the batch, returns the loss of each of its images."""
    args = state.args
    x0, condition = batch["clean"].to(args.device), batch["condition"].to(args.device)
    if frozen.autoencoder:
        # DC-AE takes pictures one by one: 0.7 GB each at 512 pixels, and no faster together
        count = args.accumulate if state.config["autoencoder"] else len(x0)
        x0 = torch.cat([frozen.autoencoder.encode(x) for x in x0.chunk(count)])
        condition = torch.cat([frozen.autoencoder.encode(x) for x in condition.chunk(count)])
    noise, sigma, kept = draw_step(x0.shape[1:], state.step, args, state.module.shift)
    noise = noise.to(args.device)
    condition = condition * kept.to(args.device)[:, None, None, None]
    text, text_mask = frozen.prompts(batch["caption"])
    if args.compile:  # few lengths, because each is compiled by itself, and torch stops at eight
        more = -text.shape[1] % 100
        text, text_mask = F.pad(text, (0, 0, 0, more)), F.pad(text_mask, (0, more))
    text, text_mask = text.to(args.device), text_mask.to(args.device)

    def objective(part):
        return model.flow_loss(
            state.module,
            x0[part],
            condition[part],
            text[part],
            text_mask[part],
            sigma[part].to(args.device),
            noise[part],
            mean_weight=state.mean_weight,
        )

    return objective, sigma


def autoencoder_objective(state, batch, frozen):
    """Prepare a batch of the clean pictures; see restorer_objective."""
    clean = batch["clean"].to(state.args.device)

    def objective(part):
        return vae.reconstruction_loss(state.module, clean[part], frozen.perceptual)

    return objective, torch.zeros(len(clean))


SKIPS_DROPPED = 0.1  # of the images: so --decoder_weight of evaluate.py can be chosen freely


def decoder_objective(state, batch, frozen):
    """Prepare a batch, whose latents the frozen restorer makes or a cache has.

    See restorer_objective."""
    args = state.args
    clean, degraded = batch["clean"].to(args.device), batch["condition"].to(args.device)
    weight = torch.ones(len(clean), 1, 1, 1)
    for i, n in enumerate(batch["draw"]):
        generator = torch.Generator().manual_seed(seed_for(args.seed, n, "skips"))
        if torch.rand((), generator=generator) < SKIPS_DROPPED:
            weight[i] = 0
    weight = weight.to(args.device)

    def objective(part):
        some = {key: batch[key][part] for key in ("condition", "caption", "draw")}
        if frozen.restorer:
            around = frozen.restorer, frozen.autoencoder, frozen.prompts
            latents = data.restore_latents(*around, some, args)
        else:
            latents = batch["latents"][part].to(args.device)
        inputs = latents, degraded[part], clean[part], weight[part]
        return vae.decoder_loss(state.module, *inputs, frozen.perceptual)

    return objective, torch.zeros(len(clean))


# The three stages share one loop. They differ in the module that is trained (the restorer, its
# autoencoder's decoder, or the autoencoder of the preset mini) and in the loss.
OBJECTIVES = {
    "autoencoder": autoencoder_objective,
    "restorer": restorer_objective,
    "decoder": decoder_objective,
}


def count_lanes(config, args):
    """Return the number of lanes in which a CPU computes a batch: threads with a part of it each.

    By default torch divides each operation among its threads. A step has a thousand small
    operations. After each one the threads spin until all are done, and one is late if another
    program uses its core. A pretrained model has large operations: one lane, so that only one set
    of gradients is held."""
    pretrained = not config["autoencoder"]
    if args.device != "cpu" or WORLD > 1 or args.compile or pretrained:
        return 1
    return min(torch.get_num_threads(), args.batch_size // args.accumulate)


def begin_lane(threads):
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # as main does


def compute_gradients(state, batch, frozen):
    """Add the gradients of a batch -> losses by bin of sigma and how many they are, [2, BINS]."""
    args = state.args
    objective, sigma = OBJECTIVES[state.config["stage"]](state, batch, frozen)
    sums = torch.zeros(2, BINS)
    count = args.accumulate * state.lanes
    for i in range(args.accumulate):  # every so many-th picture: together they are the batch
        parts = [slice(k, None, count) for k in range(i, count, args.accumulate)]
        if state.lanes > 1:
            losses = compute_lanes(state, objective, parts)
        else:
            loss = objective(parts[0])
            # the mean over the batch: its parts add up, and FSDP averages over the processes
            (loss.sum() * WORLD / args.batch_size).backward()
            losses = [loss.detach()]
        for part, loss in zip(parts, losses):
            bins = (sigma[part] * BINS).long().clamp(max=BINS - 1)
            sums.index_add_(1, bins, torch.stack([loss.float().cpu(), torch.ones(len(bins))]))
    return sums


def compute_lanes(state, objective, parts):
    """Compute the gradients of a batch's parts in parallel and add them up. Return their losses.

    Gradients are added in the order of the parts, so that the sum is reproducible."""
    weights = list(state.weights.values())

    def lane(part):
        loss = objective(part)
        return loss.detach(), torch.autograd.grad(loss.sum() / state.args.batch_size, weights)

    losses = []
    for loss, gradients in state.pool.map(lane, parts):
        losses.append(loss)
        for p, gradient in zip(weights, gradients):
            if p.grad is None:
                p.grad = torch.zeros_like(p)  # in the layout of p, as the fused optimizer expects
            p.grad.add_(gradient)
    return losses


def catch_signals():
    """Return a list to which the first Ctrl-C, SIGTERM or SIGHUP is added instead of killing."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one is the system's

    for name in data.SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(name, note)
    return caught


def validate(state, dataset, run, frozen):
    """Restore the held-out pictures with the averaged weights, and draw them.

    -> {"step", the mean PSNR and SSIM of input and restored, and for a restorer "val_loss"}. Of an
    autoencoder it is the round trip of the clean pictures. Fixed pairs, fixed noise. The first
    process does it and tells the others."""
    module = state.averaged_module()
    result = [None]
    if RANK == 0:
        args = state.args
        if state.config["stage"] == "autoencoder":
            methods = {"roundtrip": evaluate.ceiling_method(module, args.device)}
        else:
            pipeline = make_pipeline(state.config, module, frozen, args.device)
            captions = [dataset.plan(i)[2] for i in range(len(dataset))]
            restored = evaluate.restoring_method(pipeline, captions, args.device, seed=args.seed)
            methods = {"restored": restored}
        metrics = evaluate.Metrics(["psnr", "ssim"])
        rows, pictures = evaluate.evaluate_pairs(dataset, methods, metrics, quiet=True)
        path = run / f"samples/step_{state.step:06d}.png"
        save_image(evaluate.draw_grid(pictures), path)
        result = [{"step": state.step} | evaluate.validation_means(rows)]
        if state.config["stage"] == "restorer":
            result[0]["val_loss"] = validation_loss(pipeline, dataset, rows, args)
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]


def make_pipeline(config, module, frozen, device):
    """Make the Pipeline of a module that is trained; what a cache spared is loaded for it."""
    if config["stage"] == "decoder":
        restorer = frozen.restorer or data.load_frozen_restorer(config, device)
        return evaluate.Pipeline(restorer, module, frozen.prompts, steps=config["decoder"]["steps"])
    autoencoder = frozen.autoencoder or data.load_frozen(config, device)[0]
    return evaluate.Pipeline(module, autoencoder, frozen.prompts)


@torch.no_grad()
def validation_loss(pipeline, dataset, rows, args):
    """Return flow_loss over the pictures of rows, with fixed noise and sigmas.

    No sigma is drawn at one, and the whole error counts, whatever the flags of training say."""
    restorer, autoencoder = pipeline.restorer, pipeline.autoencoder
    generator = torch.Generator().manual_seed(seed_for(args.seed, 0, "validation loss"))
    total = 0.0
    for row in rows:
        item = dataset.draw(row["image"])
        pair = torch.stack([item["clean"], item["condition"]]).to(args.device)
        unit = autoencoder.factor * restorer.sana.config["patch_size"]
        x0, condition = autoencoder.encode(vae.pad_to_multiple(pair, unit)).split(1)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        sigma = model.draw_sigma(1, generator, shift=restorer.shift).to(x0)
        text, text_mask = pipeline.prompts([item["caption"]])
        text, text_mask = text.to(args.device), text_mask.to(args.device)
        total += model.flow_loss(restorer, x0, condition, text, text_mask, sigma, noise).item()
    return total / len(rows)


CURVES = {
    "loss": "training loss",
    "restored_psnr": "validation PSNR, dB",
    "roundtrip_psnr": "validation PSNR of the round trip, dB",
    "condition_norm": "norm of the condition's weights",
}


class Log:
    """log.jsonl and loss.png. A line tells of the steps since the line before it.

    Only the first process writes."""

    def __init__(self, run, args, resumed_at):
        self.run = run
        self.args = args
        self.lines = []
        self.skipped = 0  # steps without a finite loss
        self.failures = 0  # of them, in a row
        self.bad = 0  # pictures that could not be read
        self.begin_line()
        path = run / "log.jsonl"
        if resumed_at and path.is_file():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # it was being written when the machine went down
                    break
                if line["step"] <= resumed_at:
                    self.lines.append(line)
            self.skipped = self.newest("skipped") or 0
            self.bad = self.newest("bad_images") or 0
        if RANK == 0:
            vae.write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def begin_line(self):
        self.since = time.monotonic()
        self.waited = 0.0
        self.steps = 0
        self.sums = torch.zeros(2, BINS, dtype=torch.float64)  # losses by bin of sigma; how many

    def count(self, result):
        """Take in what train_step returned."""
        self.steps += 1
        self.bad += result["bad"]
        if result["finite"]:
            self.sums += result["sums"]
            self.failures = 0
        else:
            self.skipped += 1
            self.failures += 1

    def end_line(self, state, norm):
        """Write the line, and begin the next."""
        seconds = time.monotonic() - self.since
        losses, counts = self.sums.tolist()
        line = {
            "step": state.step,
            "loss": sum(losses) / max(1, sum(counts)),
            "norm": norm,
            "images_per_second": self.steps * self.args.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "skipped": self.skipped,
            "bad_images": self.bad,
        }
        if self.args.stage == "restorer":
            line["loss_by_sigma"] = [loss / n if n else None for loss, n in zip(losses, counts)]
        if self.args.stage != "autoencoder":
            line["condition_norm"] = state.condition_norm()
        if self.args.device.startswith("cuda"):
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.add(line)
        self.begin_line()

    def add(self, line):
        self.lines.append(line)
        if RANK == 0:
            with open(self.run / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def newest(self, key):
        """Return the newest value of a key, or None."""
        values = [line[key] for line in self.lines if key in line]
        return values[-1] if values else None

    def draw(self):
        charts = []
        for key, title in CURVES.items():
            points = [(line["step"], line[key]) for line in self.lines if key in line]
            if points:
                charts.append((title, points, key == "loss", None))
        if RANK == 0:
            with contextlib.suppress(UserError):  # Windows, while a viewer shows it
                evaluate.draw_charts(charts, self.run / "loss.png")


def train_step(state, batch, frozen, stop=()):
    """Do one step with a batch. Return its results over all processes.

    {"sums": sum and count of losses by sigma bin, [2, BINS], "norm": of the gradient, "finite":
    False if the step was skipped, "bad": number of unreadable pictures, "stop": whether a process
    caught a signal}."""
    args = state.args
    for group in state.optimizer.param_groups:
        group["lr"] = get_lr(state.step, args.steps, group["peak"])
    sums = compute_gradients(state, batch, frozen)
    numbers = [*sums.flatten().tolist(), state.collect_gradients(), batch["bad"], bool(stop)]
    *losses, square, bad, stopped = sum_over_processes(numbers, args.device)
    norm = math.sqrt(square)
    finite = math.isfinite(sum(losses) + norm)
    if finite:
        state.update(min(1.0, args.clip / (norm + 1e-6)))
    else:
        state.skip()
    state.clear_gradients()
    sums = torch.tensor(losses, dtype=torch.float64).view(2, BINS)
    result = {"sums": sums, "norm": norm, "finite": finite}
    return result | {"bad": int(bad), "stop": bool(stopped)}


def train(state, batches, val_set, run, log, frozen):
    """Do the steps that are left, with log, validation and checkpoints.

    frozen: the models that are used but not trained. restorer_objective has a step's loss.
    -> the signal that ended it before the last step, or None. Raises UserError."""
    args = state.args
    stop = catch_signals()
    options = {"unit": "step", "smoothing": 0.05, "disable": RANK > 0}
    with tqdm(total=args.steps, initial=state.step, **options) as bar:
        while state.step < args.steps:
            before = time.monotonic()
            batch = next(batches)
            log.waited += time.monotonic() - before
            result = train_step(state, batch, frozen, stop)
            log.count(result)
            bar.update()
            if not result["finite"]:
                loss, norm = result["sums"][0].sum().item(), result["norm"]
                bar.write(f"step {state.step}: loss {loss}, gradient norm {norm}: skipped")

            # the end: all steps are done, a signal came to some process, or nothing works any more
            done = state.step == args.steps
            last = done or result["stop"] or log.failures == MOST_FAILURES
            if last or state.step % LOG_EVERY == 0:
                log.end_line(state, result["norm"])
            pause = time.monotonic()
            if done or state.step % args.val_every == 0:
                state.validation = validate(state, val_set, run, frozen)
                log.add(state.validation)
            if last or state.step % args.save_every == 0:
                state.save(run)
                log.draw()
            log.since += time.monotonic() - pause
            figures = {"loss": log.newest("loss"), "val_dB": state.validation[state.score]}
            bar.set_postfix(figures, refresh=False)
            if last:
                break
    if log.failures == MOST_FAILURES:
        advice = f"the weights are saved, lower --lr ({args.lr:g})"
        raise UserError(f"{MOST_FAILURES} steps in a row without a finite loss; {advice}")
    if done:
        return None
    return stop[0] if stop else signal.SIGTERM  # of another process


def crop_stages(args, start=0, draws=0):
    """Return --curriculum as PairedDataset takes it: [(draws before the end, side)].

    start, draws: steps done and pictures drawn so far."""
    stages = []
    end = -start
    for side, steps in args.curriculum or []:
        end += steps
        stages.append((draws + end * args.batch_size, side))
    return stages


def bases_of(config):
    """Return the checkpoint folders that a model stands on: its restorer's, its autoencoder's."""
    bases = [base for base in (config["base"], config["vae"]) if isinstance(base, dict)]
    return [Path(base["checkpoint"]) for base in bases if Path(base["checkpoint"]).is_dir()]


def begin_run(run, args, state, digests):
    """Write config.json and pictures.json. Without --resume, delete an older run first."""
    for base in bases_of(state.config):
        if (base / "ema.safetensors").is_file():
            vae.write_text(base / "base", f"{run.resolve()} stands on it\n")  # see State.save
    if (run / "latest").is_file() and not args.resume:
        for name in ["latest", "best", "log.jsonl", "loss.png", "pictures.json"]:
            (run / name).unlink(missing_ok=True)
        for folder in [run / "samples", *run.glob(STEP_FOLDERS)]:
            shutil.rmtree(folder, ignore_errors=True)
    config = {"model": state.config, "args": vars(args), "held_out": state.held_out}
    vae.write_text(run / "config.json", json.dumps(config, indent=1))
    vae.write_text(run / "pictures.json", json.dumps(digests, indent=1))


def find_start(run, args):
    """Return the checkpoint to go on from, or None to begin. Raises UserError."""
    if not (run / "latest").is_file() or args.overwrite:
        return None
    if not args.resume:
        choices = "--resume continues it, --overwrite deletes it, --out names another"
        raise UserError(f"{run} holds a run already: {choices}")
    step = model.read_run(run)["step"]
    if step >= args.steps:
        raise UserError(f"{run} is at step {step} of {args.steps} already: --steps sets the end")
    return model.find_checkpoint(run)


def build_module(config):
    """Build what a stage trains, with unset weights. config: "model" of a config.json."""
    if config["stage"] == "restorer":
        return model.build_restorer(config)
    if config["stage"] == "autoencoder":
        return vae.DCAE(config["autoencoder"])
    decoder = config["decoder"]
    autoencoder = vae.DCAE(decoder["dcae"]).add_skips(decoder["gains"])
    return autoencoder.freeze_around_decoder()


def load_module(config, checkpoint, args, train_set, frozen):
    """Make the module to train, with a checkpoint's weights or (None) the stage's initial ones.

    For a new decoder, fill config["decoder"]. Raises UserError."""
    generator = torch.Generator().manual_seed(seed_for(args.seed, 0, "weights"))
    if config["stage"] == "restorer":
        if not checkpoint:
            return model.initial_restorer(args.model, config, generator)
        if config["lora"]:
            return model.load_restorer(checkpoint, "model")[0]
        with torch.device("meta"):
            restorer = model.build_restorer(config)
        restorer.to_empty(device="cpu")
        return vae.load_weights(restorer, checkpoint / "model.safetensors")
    begun_from = None
    if checkpoint:
        begun_from = checkpoint / "model.safetensors"
    elif model.stage_of(args.model) == config["stage"]:
        begun_from = model.find_checkpoint(args.model) / "ema.safetensors"
    if config["stage"] == "autoencoder":
        module = vae.DCAE(config["autoencoder"])
        return vae.load_weights(module, begun_from) if begun_from else module.initialize(generator)
    module = data.load_autoencoder(config, decoder=False)
    if not config["decoder"]:
        config["decoder"] = describe_decoder(module.to(args.device), args, train_set, frozen)
    if args.decoder_parts != config["decoder"]["parts"]:
        parts = config["decoder"]["parts"]
        raise UserError(f"--decoder_parts: {args.model} has trained {parts} and goes on with that")
    config["decoder"]["steps"] = args.latent_steps[0]
    module.add_skips(config["decoder"]["gains"])
    module.freeze_around_decoder()
    if begun_from:
        vae.load_weights(module, begun_from, trained=True)
    return module


def describe_decoder(autoencoder, args, train_set, frozen):
    """Return the "decoder" of a config.json, with the factors of its skips, measured."""
    batch = data.collate([train_set[n] for n in range(min(4, args.batch_size))])
    batch["caption"] = [""] * len(batch["caption"])  # which every process has encoded
    if "latents" in batch:
        latents = batch["latents"].to(args.device)
    else:
        latents = data.restore_latents(frozen.restorer, autoencoder, frozen.prompts, batch, args)
    try:
        autoencoder.add_skips()
    except ValueError as error:
        raise UserError(f"--stage decoder: {error}") from None
    gains = [autoencoder.measure_gains(latents, batch["condition"].to(args.device))]
    if WORLD > 1:  # each GPU rounds in its own way
        dist.broadcast_object_list(gains)
    return {"dcae": autoencoder.config, "gains": gains[0], "parts": args.decoder_parts}


def read_start(checkpoint, args):
    """Return {"model", "step", "draws", "held_out"} of a checkpoint, or of a new run (None).

    A checkpoint's has all of its config.json. Raises UserError."""
    if checkpoint:
        saved = model.read_run(checkpoint)
        saved["model"] = model.MODEL_DEFAULTS | saved["model"]
        return saved
    lora = {"rank": args.lora, "alpha": args.lora_alpha} if args.lora else None
    config = model.describe_model(args.model, args.conditioning, args.stage, lora)
    for base in bases_of(config):
        if Path(args.out).resolve() in base.parents:
            raise UserError(f"--out {args.out}: what this run stands on; give another folder")
    data.choose_vae(config, args.vae)
    if args.shift:
        config["shift"] = args.shift
    return {"model": config, "step": 0, "draws": 0, "held_out": None}


def load_data(args, run, saved):
    """Open the pairs -> training set, validation set, digests of their files. Raises UserError."""
    stages = crop_stages(args, saved["step"], saved["draws"])
    train_set, val_set = data.make_datasets(args, stages, saved["held_out"])
    digests = data.row_digests(train_set)
    for name, digest in data.row_digests(val_set).items():
        digests[f"validation: {name}"] = digest
    before = run / "pictures.json"
    if saved["step"] and before.is_file() and "--data" not in given_flags():
        what = f"{run} began with other pictures; --data, given again, goes on with these"
        data.check_same(vae.read_json(before), digests, what)
    config = saved["model"]
    if args.data:
        config["enlarge"] = train_set.source.enlarge
    new = config["conditioning"] == "projection"
    if config["stage"] == "decoder":
        new = args.decoder_parts != "decoder"
    if "--proj_lr" in given_flags() and not new:
        raise UserError("--proj_lr: no projection and no skips are trained here; leave it out")
    return train_set, val_set, digests


def describe_validation(args, val_set):
    """Hash what the pairs of a validation depend on."""
    flags = args.degradations, args.max_degradations, args.seed
    return data.short_hash([data.row_digests(val_set), val_set.crop, flags])


def load_frozen(args, saved, train_set, val_set, draws):
    """Load what stands around the module that is trained -> Frozen. Raises UserError.

    draws: the numbers of all pictures that this process will draw."""
    config = saved["model"]
    stage = config["stage"]
    sides = [args.resolution] + [side for side, _ in args.curriculum or []]
    if stage == "autoencoder":
        frozen = Frozen(None, data.Prompts())
    else:
        frozen = Frozen(*data.load_frozen(config | {"decoder": None}, args.device))
        data.check_resolution(sides, frozen.autoencoder, config)
        if not model.works_on_pixels(config):
            print_memory(config, args, frozen.autoencoder)
    if args.cache:
        frozen.autoencoder = None
        frozen.prompts.known = train_set.prompts()
    elif frozen.prompts.folder:
        # all captions of the run, before what is trained takes the memory
        frozen.prompts.prepare(data.captions_of(train_set, draws, val_set))
    if stage == "decoder" and not args.cache:
        frozen.restorer = data.load_frozen_restorer(config, args.device)
    if args.lpips_weights:
        if min(sides) < 64:
            raise UserError("--lpips_weights: LPIPS needs crops of 64 pixels; see --resolution")
        heads = evaluate.read_published(evaluate.LPIPS_HEADS, args.lpips_weights[1])
        trunk = evaluate.read_published(evaluate.LPIPS_TRUNK, args.lpips_weights[0])
        frozen.perceptual = evaluate.LPIPS(trunk, heads).to(args.device)
    return frozen


def main():
    torch.set_flush_denormal(True)  # silu's gradient has denormals; they slow a CPU 100-fold
    if WORLD > 1 and torch.cuda.device_count() > LOCAL_RANK:
        torch.cuda.set_device(LOCAL_RANK)  # before anything is put on a GPU: "cuda" is this one
    args = parse_args()
    start_processes(args)
    run = Path(args.out)
    checkpoint = find_start(run, args)
    saved = read_start(checkpoint, args)
    train_set, val_set, digests = load_data(args, run, saved)
    jitter = "color_jitter" in train_set.degradation_names()
    if args.cache:
        about = data.fingerprint(args, saved["model"]), data.row_digests(train_set)
        train_set = data.CachedDataset(args.cache, *about, len(train_set))
    # every draw of the run has a number; this process takes every WORLD-th
    first = saved["draws"]
    last = first + (args.steps - saved["step"]) * args.batch_size
    draws = range(first + RANK, last, WORLD)
    frozen = load_frozen(args, saved, train_set, val_set, draws)
    module = load_module(saved["model"], checkpoint, args, train_set, frozen)
    state = State(saved["model"], module, args)
    on_gpu = args.device.startswith("cuda")
    batches = data.load_batches(train_set, args.batch_size // WORLD, draws, args.workers, on_gpu)
    if jitter:
        state.mean_weight = 0.1
    state.held_out = data.row_names(val_set)
    state.validated_on = describe_validation(args, val_set)
    if checkpoint:
        state.load(checkpoint)
        if state.validated_on != saved["validated_on"]:
            print("validation is on other pictures than before: best begins anew")
            state.best = [-math.inf, None]
            state.validation = None
    if RANK == 0:
        begin_run(run, args, state, digests)
    log = Log(run, args, state.step)
    introduce(args, state, len(train_set), run)
    try:
        if not state.validation:
            state.validation = validate(state, val_set, run, frozen)
            log.add(state.validation)
        caught = train(state, batches, val_set, run, log, frozen)
    except Exception:  # a bad picture, a dead worker, no memory: keep what there is
        if state.consistent and state.step > saved["step"] and WORLD == 1:
            state.save(run)
        raise
    finally:
        batches.close()  # ends the workers
    report(state, run, len(val_set))
    if caught:
        stopped = f"stopped at step {state.step} of {args.steps}"
        print(f"{stopped}: python train.py --resume {run} goes on")
    status = 128 + caught if caught else 0
    if WORLD > 1:
        # gloo's threads may still hold tensors, and would abort a Python that is shutting down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if caught:
        sys.exit(status)


# --------------------------------------------------------------------------------------------------
# How much memory a run takes, derived from the shapes alone: nothing is allocated.


def estimate_memory(config, args, autoencoder):
    """Return {what: bytes} that the training of a restorer or a decoder keeps on each device.

    config: "model" of config.json. Left out: what the text encoder takes before training, and what
    libraries take for themselves."""
    if config["stage"] == "decoder":
        about = {"dcae": autoencoder.config, "gains": None, "parts": args.decoder_parts}
        config = config | {"decoder": about}
    with torch.device("meta"):
        module = build_module(config)
        restorer = model.build_restorer(config)
    trained = sum(p.numel() for p in vae.trained_weights(module).values())
    frozen = sum(p.numel() for p in module.parameters()) - trained
    trained /= WORLD
    half = args.device.startswith("cuda") and not config["autoencoder"]  # what is frozen, in bf16
    # bytes per trained weight: the weight with its low bits, the gradient, two moments
    weight, gradient, moments = {
        "adamw": (4, 4, 8),
        "adamw_bf16": (4, 2, 4),
        "adamw_sr": (2, 2, 4),
    }[args.optimizer]
    bf16_base = half and config["lora"] and config["stage"] == "restorer"
    sizes = {
        "weights": weight * trained + (2 if bf16_base else 4) * frozen,
        "gradients": gradient * trained,
        "moments": moments * trained,
        "average": 4 * trained if args.ema_device == args.device else 0,
        "autoencoder": 0 if args.cache else sum(p.nbytes for p in autoencoder.parameters()),
    }
    latents = largest_latents(args, autoencoder)
    side = latents.shape[-1] * autoencoder.factor
    if config["stage"] == "decoder":
        count = sum(p.numel() for p in restorer.parameters())
        sizes["restorer"] = 0 if args.cache else (2 if half else 4) * count
        pixels = torch.empty(len(latents), 3, side, side, device="meta")
        sizes["activations"] = saved_bytes(module, pixels, latents)
        return sizes
    half = args.optimizer != "adamw" or bf16_base
    activations = activation_bytes(config, latents, half, args.checkpointing)
    # one after the other: encoding a picture holds five tensors of its first stage at once
    width = autoencoder.config["encoder_block_out_channels"][0]
    encoding = 0 if args.cache else 4 * 5 * width * min(side, 2 * vae.TILE) ** 2
    sizes["activations"] = max(activations, encoding)
    return sizes


def largest_latents(args, autoencoder):
    """Return empty latents of a batch's part at the largest resolution, on the meta device."""
    side = max([args.resolution] + [side for side, _ in args.curriculum or []])
    count = args.batch_size // WORLD // args.accumulate
    grid = side // autoencoder.factor
    return torch.empty(count, autoencoder.channels, grid, grid, device="meta")


def activation_bytes(config, latents, half, checkpointing):
    """Return the bytes that autograd keeps of a restorer between forward and backward.

    For captions of 64 tokens. All blocks are alike: one and two of them tell what each adds."""
    kept = []
    for blocks in (1, 2):
        with torch.device("meta"):
            short = config | {"sana": config["sana"] | {"num_layers": blocks}}
            restorer = model.build_restorer(short)
            if half:
                restorer.sana.to(torch.bfloat16)
            timestep = torch.empty(len(latents))
            text = torch.empty(len(latents), 64, restorer.sana.config["caption_channels"])
        kept.append(saved_bytes(restorer, latents, latents, timestep, text))
    block = kept[1] - kept[0]
    ends = kept[0] - block
    blocks = config["sana"]["num_layers"]
    if not checkpointing:
        return ends + blocks * block
    sana = restorer.sana.config
    positions = len(latents) * latents.shape[2:].numel() / sana["patch_size"] ** 2
    dim = sana["num_attention_heads"] * sana["attention_head_dim"]
    inputs = (2 if half else 4) * positions * dim  # of a block
    return ends + blocks * inputs + block


def saved_bytes(module, *inputs):
    """Count what autograd saves of a forward pass on the meta device; each storage once."""
    kept = {}
    own = {p.untyped_storage()._cdata for p in module.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor  # keeps it alive, so that its id is not reused
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def print_memory(config, args, autoencoder):
    """Say how much memory the run will take, and what helps where a GPU has less."""
    bytes_of = estimate_memory(config, args, autoencoder)
    total = sum(bytes_of.values())
    parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in bytes_of.items())
    print(f"memory: about {total / 1e9:.1f} GB ({parts})")
    if not args.device.startswith("cuda"):
        return
    there = torch.cuda.get_device_properties(args.device).total_memory
    if total > 0.95 * there:
        restorer = args.stage == "restorer"  # a decoder has neither checkpointing nor LoRA
        left = []
        if restorer and not args.checkpointing:
            left.append("--checkpointing (most activations)")
        if args.ema_device != "cpu":
            left.append("--ema_device cpu (the average)")
        if not args.cache:
            left.append("--cache (what is frozen)")
        if restorer and not args.lora:
            left.append("--lora 16 (gradients, moments and average of all but the changes)")
        left.append("--accumulate (activations, divided by its number)")
        print(f"this GPU has {there / 1e9:.1f} GB; what spares memory: {'; '.join(left)}")


def introduce(args, state, images, run):
    """Print what is about to be done."""
    count = sum(p.numel() for p in state.weights.values()) / 1e6
    where = f"{WORLD} x {args.device}" if WORLD > 1 else args.device
    steps = args.steps - state.step
    work = f"{steps} steps of {args.batch_size} crops of {args.resolution} pixels"
    trained = "" if args.stage == "restorer" else f", --stage {args.stage}"
    print(f"model {args.model}{trained}, {count:.2f} M parameters, on {where}")
    print(f"{work} from {images} images -> {run}")


def report(state, run, count):
    """Print the last lines: what was reached, and where it lies."""
    v = state.validation
    method = state.score.removesuffix("_psnr")
    if method == "roundtrip":
        scores = f"round trip PSNR {v['roundtrip_psnr']:.2f} dB, SSIM {v['roundtrip_ssim']:.3f}"
    else:
        psnr = f"PSNR {v['input_psnr']:.2f} -> {v['restored_psnr']:.2f} dB"
        scores = f"{psnr}, SSIM {v['input_ssim']:.3f} -> {v['restored_ssim']:.3f}"
    word = "validated" if v["step"] == state.step else "last validated"  # after a stop
    print(f"{word} at step {v['step']} on {count} images: {scores}")
    print(f"degraded | {method} | clean: {run}/samples/step_{v['step']:06d}.png")
    print(f"{run}/loss.png, log.jsonl, checkpoint step_{state.step:06d}")


if __name__ == "__main__":
    run_script(main)
