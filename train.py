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
checkpoints step_N/. The files latest and best name one of them. The folder is whole: it may be
moved, and what it was begun with may be deleted (but a pretrained model is only named).
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

# torch's threads wait for each other by spinning, which starves other programs, and so each other.
# Now they soon go to sleep instead. (OpenMP reads this when torch is imported.)
os.environ.setdefault("GOMP_SPINCOUNT", "500")

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm

import data
import degrade
import evaluate
import model
import vae
from data import check_device, default_model, seed_for
from degrade import Parser, UserError, between, explain_errors, run_script
from model import to_device

# --------------------------------------------------------------------------------------------------
# Settings. What was typed comes first, then the defaults of the model and the stage, then COMMON.

COMMON = data.DEFAULTS | {
    "stage": "restorer",
    "conditioning": None,  # None: as the model has it
    "lora": None,
    "shift": None,
    "share_at_one": 0.0,
    "condition_dropout": 0.0,
    "latent_steps": 1,
    "lpips_weights": None,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "ema_decay": 0.9999,
    "accumulate": 1,
    "checkpointing": False,
    "cache": None,
    "curriculum": None,
    "save_every": 1000,
    "val_every": 500,
}
TINY = {"resolution": data.RESOLUTIONS["tiny"], "batch_size": 8, "share_at_one": 0.3}
MINI = {"resolution": data.RESOLUTIONS["mini"], "batch_size": 8, "share_at_one": 0.3}
SANA = {"resolution": data.RESOLUTION, "batch_size": 4, "steps": 10000}
DEFAULTS = {
    ("tiny", "restorer"): TINY | {"lr": 5e-3, "steps": 12000, "clip": 0.2},
    ("mini", "autoencoder"): MINI | {"lr": 2e-3, "steps": 4500, "clip": 1.0},
    ("mini", "restorer"): MINI | {"lr": 2e-3, "steps": 4500, "clip": 0.2},
    ("mini", "decoder"): MINI | {"lr": 2e-3, "steps": 3200, "clip": 1.0},
    ("pretrained", "restorer"): SANA | {"lr": 1e-5, "clip": 0.1},
    # few weights, and their product starts at 0
    ("pretrained", "LoRA"): SANA | {"lr": 1e-4, "clip": 0.1},
    ("pretrained", "decoder"): SANA | {"lr": 1e-4, "clip": 1.0},
}
DEMO = {"steps": 4000, "max_degradations": 1}  # in its few minutes it learns no mixtures
KEPT = ["stage", "conditioning", "lora", "optimizer", "shift"]  # a resumed run cannot change them
# on --resume these follow from the machine and the other flags anew, unless they were typed
FRESH_ON_RESUME = ["device", "ema_device", "workers", "accumulate", "proj_lr"]

# Several processes, as torchrun starts them: one a GPU, on one machine or several.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine: the number of its GPU


def make_parser():
    """Make the parser. It returns only what was typed."""
    silent = argparse.SUPPRESS
    parser = Parser(__doc__, usage="python train.py [flags]", argument_default=silent)
    data.add_data_flags(parser)
    count, share, positive = between(int, 1), between(float, 0, 1), between(float, 0)
    add = parser.group("training")
    add("--stage", choices=model.STAGES, help="what to train (default restorer)")
    add("--steps", type=count, help="default: the demo 4000, tiny 12000, SANA 10000; see DEFAULTS")
    add("--batch_size", type=count, help="of all processes together (default 8; SANA 4)")
    add("--lr", type=share, help="peak rate (default 1e-5 for SANA, with LoRA 1e-4; see DEFAULTS)")
    add("--proj_lr", type=share, help="of the projection or the skips (see projection_lr)")
    add("--weight_decay", type=positive, help="AdamW's (default 0)")
    add("--clip", type=positive, help="largest gradient norm (SANA 0.1; see DEFAULTS); 0: no limit")
    add("--ema_decay", type=share, help="of the average (default 0.9999)")
    add("--ema_device", type=check_device, help="cpu spares a GPU 4 bytes a weight")
    text = "compute a batch in so many parts (default 1; one by one in SANA's --stage decoder)"
    add("--accumulate", type=count, help=text)
    add("--curriculum", type=curriculum, metavar="SIDE:STEPS,...", help="512:8000,1024:2000")
    add = parser.group("--stage restorer")
    ways = ["projection", "widen", "none"]
    add("--conditioning", choices=ways, help="see model.Restorer (SANA: projection; tiny: widen)")
    add("--lora", type=count, metavar="RANK", help="train low-rank changes alone, see model.LoRA")
    text = "adamw: fp32 weights; adamw_bf16: bf16, exact (default for SANA on a GPU)"
    add("--optimizer", choices=["adamw", "adamw_bf16"], help=text)
    add("--shift", type=between(float, 0.01, 100), help="of sigmas (default 3, or the model's)")
    add("--share_at_one", type=share, help="share at sigma = 1 (default 0 for SANA, else 0.3)")
    add("--condition_dropout", type=share, help="for --condition_guidance (default 0)")
    add("--checkpointing", action="store_true", help="compute activations twice to save memory")
    add("--cache", metavar="FOLDER", help="of python data.py cache, with the same data flags")
    add = parser.group("--stage autoencoder, --stage decoder")
    add("--lpips_weights", nargs=2, metavar=("TRUNK", "HEADS"), help="local files: adds 0.1 LPIPS")
    add = parser.group("--stage decoder")
    text = "sampling steps for the latents to learn from (default 1); 0: the condition's own"
    add("--latent_steps", type=between(int, 0, 1000), metavar="N", help=text)
    add = parser.group("run")
    add("--out", help="run folder (default out/demo, or out/NAME for NAME.csv)")
    add("--resume", nargs="?", const=True, metavar="RUN", help="go on with it (none yet: begin)")
    add("--save_every", type=count, help="steps between checkpoints (default 1000)")
    add("--val_every", type=count, help="steps between validations (default 500)")
    return parser


def parse_args(argv=None):
    """Read the flags -> their values; those of a run that is resumed are its own, if not typed.

    .typed: {flag: value} of what was typed. .given: also when the run was begun. .checkpoint: the
    folder to go on from, or None. Raises UserError."""
    parser = make_parser()
    flags = vars(parser.parse_args(argv))
    run = find_run(flags)
    typed = {name: value for name, value in flags.items() if name not in ("out", "resume")}
    checkpoint = None
    if not (run / "latest").is_file():
        if isinstance(flags.get("resume"), str):  # killed before its first checkpoint
            if not (run / "config.json").is_file():
                raise UserError(f"--resume {run}: nothing was saved here; repeat the first command")
            typed = vae.read_json(run / "config.json")["given"] | typed
        given, values = typed, new_settings(typed)
    elif "resume" in flags:
        checkpoint = model.find_checkpoint(run)
        given, values = resumed_settings(checkpoint, typed)
    else:
        advice = "--resume goes on with it, --out names another folder"
        raise UserError(f"{run} holds a run already: {advice}")
    about = {"out": str(run), "resume": "resume" in flags, "checkpoint": checkpoint}
    args = Namespace(**values, **about, given=given, typed=typed)
    check_flags(parser, args)
    return args


def find_run(flags):
    """Return the folder of the run that the flags name. Raises UserError."""
    table = flags.get("data")
    named = flags.get("resume")
    if not isinstance(named, str):
        return Path(flags.get("out", f"out/{Path(table).stem if table else 'demo'}"))
    if "out" in flags:
        raise UserError("--out: --resume names the folder already")
    if (Path(named) / "ema.safetensors").is_file():
        raise UserError(f"--resume {named}: a checkpoint; give the run folder that holds it")
    if not Path(named).is_dir():
        raise UserError(f"--resume {named}: no such folder; give the one that --out named")
    return Path(named)


# typed: the flags of this command. given: and those typed when the run was begun. known: and, of a
# run that goes on, all values that it had. What is known comes before what follows from it, that
# before DEFAULTS, and that before COMMON.


def new_settings(given):
    """Return {flag: value} for a new run. given: what was typed."""
    values = COMMON | given
    stage, lora = values["stage"], values["lora"]
    name = given.get("model")
    if not name:
        name = "mini" if stage == "autoencoder" else default_model(values["data"], values["device"])
    family = name if name in model.PRESETS else "pretrained"
    further = False
    if model.is_run(name):
        before = model.read_run(name)["model"]
        if stage == "restorer":
            lora = lora or before["lora"]
        if before["autoencoder"]["kind"] != "pretrained":
            family = before["name"]
            further = before["stage"] == stage and not lora
    return choose_settings(given | {"model": name, "lora": lora}, family, stage, further)


def resumed_settings(checkpoint, typed):
    """Return (all that was typed, {flag: value}) for a run that goes on. Raises UserError."""
    saved = model.read_run(checkpoint)
    config = saved["model"]
    begun = saved["args"] | config
    run = checkpoint.parent
    for name in KEPT:
        if name in typed and typed[name] != begun[name]:
            raise UserError(f"--{name}: {run} was begun with {begun[name]} and keeps it")
    family = "pretrained"
    if config["autoencoder"]["kind"] != "pretrained":
        family = config["name"]
        if "model" in typed:
            raise UserError("--model: with --resume it says where a pretrained model is now")
    given = saved["given"] | typed
    if "curriculum" in typed:  # which sets these
        for name in {"steps", "resolution"} - typed.keys():
            given.pop(name, None)
    known = saved["args"] | typed
    for name in set(FRESH_ON_RESUME) - given.keys():
        del known[name]
    return given, choose_settings(known, family, config["stage"])


def choose_settings(known, family, stage, further=False):
    """Add all defaults to the flags that are known -> {flag: value}.

    family: "tiny", "mini" (or a run of them), or "pretrained". further: whether --model is a run of
    a preset in this stage."""
    row = "LoRA" if known["lora"] and family == "pretrained" else stage
    # what has no defaults is refused by describe_model
    values = COMMON | DEFAULTS.get((family, row), DEFAULTS[family, "restorer"])
    if family == "tiny" and not known.get("data"):
        values |= DEMO
    if further:
        values["lr"] /= 10  # at the peak it would forget what it has learnt
        if "lr" not in known and RANK == 0:
            print(f"--model {known['model']} is trained already: --lr {values['lr']:g}, a tenth")
    values |= known
    derived = {
        "ema_device": values["device"],
        "proj_lr": projection_lr(values["lr"], stage, values["lora"]),
    }
    if (family, stage) == ("pretrained", "restorer") and values["device"].startswith("cuda"):
        derived["optimizer"] = "adamw_bf16"
    if (family, row) == ("pretrained", "decoder"):  # 4.6 GB an image of 512 pixels
        derived["accumulate"] = max(1, values["batch_size"] // WORLD)
    values |= derived | known
    if values["curriculum"]:
        values["steps"] = sum(steps for _, steps in values["curriculum"])
        values["resolution"] = values["curriculum"][0][0]
    return values


def projection_lr(lr, stage, lora):
    """Return the learning rate of the projection or the skips: new weights that start at 0.

    Those of the projection have to grow to about 1, those of the skips to about 0.1."""
    if stage == "decoder":
        return min(10 * lr, 5e-3)
    if lora:  # whose own rate is ten times the whole network's
        return min(10 * lr, 0.05)
    return min(100 * lr, 0.05)


def check_flags(parser, args):
    """Raise UserError for flags that do not go together, or have no effect."""
    idle = {}  # {flag: beside what it has no effect}
    if args.curriculum:
        idle |= dict.fromkeys(["resolution", "steps", "cache"], "--curriculum")
    if not args.data:
        demo = "the demo, which draws its own pictures; give --data"
        idle |= dict.fromkeys(["val_data", "skip_bad", "cache"], demo)
    if args.stage == "autoencoder":
        names = ["proj_lr", "caption_dropout", "degradations", "max_degradations"]
        idle |= dict.fromkeys(names, "--stage autoencoder")
    for name, title in parser.titles.items():
        if title.startswith("--stage") and args.stage not in title:
            idle[name] = f"--stage {args.stage}"
    for name in args.given:
        if name in idle:
            raise UserError(f"--{name}: it has no effect with {idle[name]}")
    if args.batch_size % (args.accumulate * WORLD):
        times = f"--accumulate {args.accumulate} times {WORLD} processes"
        raise UserError(f"{times}: has to be a divisor of --batch_size {args.batch_size}")
    parser.parse_args(["--device", args.device])  # that of a run may not be here


def curriculum(text):
    """argparse type: "512:8000,1024:2000" -> [[512, 8000], [1024, 2000]]."""
    pieces = []
    for piece in text.split(","):
        side, _, steps = piece.partition(":")
        pieces.append([between(int, 1, 2**14)(side), between(int, 1)(steps)])
    return pieces


# --------------------------------------------------------------------------------------------------
# Several processes. FSDP2 (fully_shard) gives each one some rows of every weight, its gradient, its
# moments and its average, and gathers a block's weights while it is computed.


def start_processes(args):
    """Meet the other processes, if there are any. Only the first one's output is shown."""
    if WORLD > 1:
        if ":" in args.device:
            raise UserError(f"--device {args.device}: each process takes its own; give cuda")
        if args.device == "cuda" and torch.cuda.device_count() <= LOCAL_RANK:
            count = f"{torch.cuda.device_count()} GPUs for more processes"
            raise UserError(f"{count}: give torchrun that many, or --device cpu")
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


def first_does(function):
    """Call function in the first process -> its result in all processes, or its UserError."""
    if WORLD == 1:
        return function()
    told = [None, None]  # result, error
    if RANK == 0:
        try:
            told[0] = function()
        except (UserError, OSError) as error:
            told[1] = str(error)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1])
    return told[0]


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


def gather(own, weight):
    """Return the whole tensor on rank 0, None on the others. Every process must call it.

    own: this process's shard, laid out as that of weight. With one process, return own."""
    if WORLD == 1:
        return own
    from torch.distributed.tensor import DTensor

    bits = own.view(torch.bfloat16) if own.dtype == torch.int16 else own  # NCCL has no int16
    layout = {"shape": weight.shape, "stride": weight.stride()}
    bits = bits.to(weight.device)
    whole = DTensor.from_local(bits, weight.device_mesh, weight.placements, **layout)
    whole = whole.full_tensor().view(own.dtype)
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
# bf16 weight: rounded to the nearest, nearly all of it would be lost. So the weight's low 16 bits
# are kept beside it. (fp32 weights have torch's AdamW.)

BETA1, BETA2, EPS = 0.9, 0.99, 1e-8
MOMENTS = "exp_avg", "exp_avg_sq"


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


def round_stochastically(x, seed, start):
    """Round fp32 [n] to bf16, randomly up or down, so that the expected value is x.

    seed: int32 []. start: int32 [], index of the first number. The random bits are a hash
    (lowbias32) of each index. Unlike a Generator, which draws one by one, a hash can be
    compiled into one parallel pass with the rest of the update."""
    noise = torch.arange(x.numel(), dtype=torch.int32, device=x.device) + start
    noise = noise ^ seed  # below, a mask after >> clears the copies of the sign bit
    noise = (noise ^ ((noise >> 16) & 0xFFFF)) * 0x7FEB352D
    noise = (noise ^ ((noise >> 15) & 0x1FFFF)) * -0x7B935975       # its upper half is the better
    bits = x.view(torch.int32) + ((noise >> 16) & 0xFFFF)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def adamw_bf16(weight, low, grad, exp_avg, exp_avg_sq, average, seed, start, numbers):
    """Do one AdamW step (arXiv 1711.05101) of a tensor, in place. All arithmetic is in fp32.

    weight, grad, exp_avg, exp_avg_sq: bf16 [n]. low: int16 [n], the bits that weight lacks.
    average: fp32 [n], the moving average, or None. seed, start: of the rounding of exp_avg_sq,
    which a step often moves by less than half a unit. numbers: five tensors [], so that the
    function can be compiled (a Python number would be a constant): 1 - lr * weight decay,
    -lr / (1 - BETA1^t), sqrt(1 - BETA2^t), the factor of the gradient, the weight of the new in
    the average.

    The operations are those that give the same bits eager and compiled, on a CPU. lerp and addcmul
    do not, nor does sqrt (eager torch calls MKL's, a fifth of whose results are rounded wrong)."""
    decay, rate, correction, scale, share = numbers
    w = join_fp32(weight, low)
    g = grad.float() * scale
    m = exp_avg.float()
    m = m + (g - m) * (1 - BETA1)
    v = exp_avg_sq.float() * BETA2 + g * g * (1 - BETA2)
    root = 1 / v.rsqrt()
    w = w * decay + rate * m / (root / correction + EPS)
    high, rest = split_fp32(w)
    weight.copy_(high)
    low.copy_(rest)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(round_stochastically(v, seed, start))
    if average is not None:
        average.copy_(average + (w - average) * share)


@torch.no_grad()
def compile_update(device):
    """Return adamw_bf16 compiled into one pass over the memory; as it is if there is no compiler.

    Compiled it moves 26 bytes a weight with the average; eager, operation by operation, 442. One
    graph serves tensors of any length, in blocks that fit the first: a large one. If too many are
    needed, fullgraph makes that an error, where torch would go on eager without a word."""
    update = torch.compile(adamw_bf16, dynamic=True, fullgraph=True)
    average = torch.zeros(2**20, device=device)
    weight, low = split_fp32(average)
    grad, exp_avg, exp_avg_sq = weight.clone(), weight.clone(), weight.clone()
    seed, start = torch.zeros(2).int()
    numbers = torch.ones(5).unbind()
    try:
        update(weight, low, grad, exp_avg, exp_avg_sq, average, seed, start, numbers)
    except RuntimeError as error:  # no Triton, no C compiler
        reason = str(error).strip().splitlines()[0]
        print(f"adamw_bf16 cannot be compiled here ({reason}): its update takes 17 times as long")
        return adamw_bf16
    return update


# --------------------------------------------------------------------------------------------------
# State: what the next step depends on. Randomness needs none (see seed_for).

PROGRESS = "step", "drawn", "skipped", "validation", "best"  # of State, in config.json


class State:
    """The weights, their moving average, AdamW's moments, and the number of steps done.

    module: what a stage trains. Parameters without a gradient are never updated. Dicts map the name
    of each trained weight to a tensor:
    weights  the module's parameter; with several processes a DTensor, which FSDP gathers.
    own      this process's shard, a plain tensor that is updated in place. With one process it is
             the weight itself.
    average  the moving average of the shard, fp32.
    moments  {"exp_avg", "exp_avg_sq"}; of a bf16 weight also "low", the rest of split_fp32."""

    def __init__(self, module, args):
        self.args = args
        self.step = 0
        self.drawn = 0  # pictures drawn for them
        self.skipped = 0  # steps without a finite loss
        self.validation = None  # the last line of validate()
        self.best = [0.0, None]  # validation PSNR, name of the checkpoint that had it
        self.saved = None  # name of the checkpoint that was written last
        self.module = module
        weights = vae.trained_weights(module)
        fp32 = {name: shard(p.detach()).float().clone() for name, p in weights.items()}
        if args.optimizer == "adamw_bf16":
            module.sana.to(torch.bfloat16)
            on_cpu = args.device == "cpu"
            self.adamw_bf16 = adamw_bf16 if on_cpu else compile_update(args.device)
        module.to(args.device)
        if WORLD > 1:
            shard_module(module, args.device)
        self.weights = vae.trained_weights(module)
        self.own = dict(self.weights)
        if WORLD > 1:
            self.own = {name: p.detach().to_local() for name, p in self.weights.items()}
        self.average = {name: t.to(args.ema_device) for name, t in fp32.items()}
        self.average_every = 1 if args.ema_device == args.device else 50  # weights have to travel
        self.moments = {}
        pretrained = {"params": [], "peak": args.lr}
        new = {"params": [], "peak": args.proj_lr}
        # the optimizer keeps these dicts, in which update sets "lr", also for bf16 weights
        self.group_of = {name: new if is_new(name) else pretrained for name in self.own}
        options = {"lr": args.lr, "betas": (BETA1, BETA2), "eps": EPS, "fused": True}
        for name, p in self.own.items():
            if p.dtype != torch.bfloat16:
                self.group_of[name]["params"].append(p)
        self.adamw = torch.optim.AdamW([pretrained, new], weight_decay=args.weight_decay, **options)
        for name, p in self.own.items():
            moments = {key: torch.zeros_like(p.detach()) for key in MOMENTS}
            if p.dtype == torch.bfloat16:  # keep what the cast took away
                high, moments["low"] = split_fp32(fp32[name].to(p.device))
                p.detach().copy_(high)  # it rounds ties away from 0, the cast to even
            else:  # as torch's first step would: so load() finds where to copy
                self.adamw.state[p] = moments | {"step": torch.zeros((), device=p.device)}
            self.moments[name] = moments

    def averaged_module(self, build):
        """Make a module with the averaged weights, in the first process; None in the others.

        build: makes one with unset weights."""
        tensors = dict(self.module.named_buffers())
        on_gpu = self.args.device.startswith("cuda")
        for name, p in self.module.named_parameters():
            whole = gather(self.average[name], p) if name in self.weights else p
            if RANK == 0:
                dtype = torch.bfloat16 if on_gpu and p.dtype == torch.bfloat16 else torch.float32
                tensors[name] = whole.to(self.args.device, dtype)
        if RANK > 0:
            return None
        with torch.device("meta"):
            module = build()
        module.load_state_dict(tensors, assign=True)  # on one device: the averages, not a copy
        return module.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, scale):
        """Do one AdamW step with the gradients times scale, and average the weights.

        average <- decay * average + (1 - decay) * weights. The decay warms up, so that the start is
        soon forgotten."""
        args = self.args
        for group in self.adamw.param_groups:
            group["lr"] = get_lr(self.step, args.steps, group["peak"])
            for p in group["params"]:
                p.grad.mul_(scale)
        self.count_step()
        self.adamw.step()
        since = self.step % self.average_every or self.average_every  # steps that it averages
        decay = min(args.ema_decay, (1 + self.step) / (10 + self.step)) ** since
        for name, p in self.own.items():
            if p.dtype == torch.bfloat16:
                self.update_bf16(name, p, self.group_of[name]["lr"], scale, 1 - decay)
                if self.average_every == 1:
                    continue  # that moved its average, too
            if self.step % self.average_every == 0 or self.step == args.steps:
                weight = p
                if p.dtype == torch.bfloat16:
                    weight = join_fp32(p, self.moments[name]["low"])
                average = self.average[name]
                if args.ema_device == "cpu" and args.device.startswith("cuda"):  # pinned: faster
                    weight = torch.empty_like(average, pin_memory=True).copy_(weight)
                average.lerp_(weight.to(args.ema_device), 1 - decay)

    def update_bf16(self, name, p, lr, scale, share):
        """Do the update of one bf16 weight; with its average, if that lies on the same device."""
        if p.numel() == 0:  # several processes: more than the weight has rows
            return
        t = self.step
        numbers = [
            1 - lr * self.args.weight_decay,
            -lr / (1 - BETA1**t),
            math.sqrt(1 - BETA2**t),
            scale,
            share,
        ]
        seed = seed_for(self.args.seed, t, f"rounding of {name}")
        whole = self.weights[name]
        # the index, in the whole weight, of this process's first number
        start = RANK * rows_of_each(whole) * math.prod(whole.shape[1:])
        self.adamw_bf16(
            p.detach().view(-1),
            self.moments[name]["low"].view(-1),
            p.grad.contiguous().view(-1),
            self.moments[name]["exp_avg"].view(-1),
            self.moments[name]["exp_avg_sq"].view(-1),
            self.average[name].view(-1) if self.average_every == 1 else None,
            *torch.tensor([seed, start]).int(),  # of 63 bits, the lower 32
            torch.tensor(numbers).unbind(),
        )

    def collect_gradients(self):
        """Give each shard its gradient -> their norms, a list of fp32 []."""
        if WORLD > 1:
            for name, p in self.own.items():
                p.grad = self.weights[name].grad.to_local()
        norms = []
        for dtype in (torch.bfloat16, torch.float32):  # mixed, a GPU would take them one by one
            gradients = [p.grad for p in self.own.values() if p.dtype == dtype]
            if gradients:
                norms += torch._foreach_norm(gradients, dtype=torch.float32)
        return norms

    def clear_gradients(self):
        for name, p in self.own.items():
            p.grad = None
            self.weights[name].grad = None

    def skip(self):
        """Count a step without an update."""
        self.count_step()
        self.skipped += 1
        for state in self.adamw.state.values():
            state["step"] += 1

    def count_step(self):
        self.step += 1
        self.drawn += self.args.batch_size

    def save(self, run, config, rows, score):
        """Write run/step_N, then update run/best and run/latest. Every process must call it.

        config: "model" of config.json. rows: content of rows.json. score: the key of validation
        that best goes by. The folder is written under a temporary name, then renamed. The newest
        and the best checkpoint are kept, all others are deleted. Raises UserError if it cannot be
        written, or if another process has saved in this run; older checkpoints then stay."""
        tensors = {"model": {}, "ema": {}, "optimizer": {}}
        for name, p in self.weights.items():
            tensors["model"][name] = gather(self.own[name].detach(), p)
            tensors["ema"][name] = gather(self.average[name], p)
            for key, value in self.moments[name].items():
                tensors["optimizer"][f"{key}.{name}"] = gather(value, p)
        folder, latest = run / f"step_{self.step:06d}", run / "latest"
        if RANK > 0 or self.saved == folder.name:  # the last step was one of --save_every as well
            return
        newest = latest.read_text() if latest.is_file() else None
        if newest != self.saved:
            raise UserError(f"{run}: another process trains here, it has saved {newest}")
        psnr = self.validation[score]
        if self.validation["step"] == self.step and psnr >= self.best[0]:  # of these very weights
            self.best = [psnr, folder.name]
        content = describe(self.args, config, rows)
        for key in PROGRESS:
            content[key] = getattr(self, key)
        partial = run / f".{folder.name}.partial"
        try:
            for old in [folder, *run.glob(".step_*.partial")]:  # of a run that was killed
                shutil.rmtree(old, ignore_errors=True)
            for name, weights in tensors.items():
                vae.save_weights(weights, partial / f"{name}.safetensors")
            vae.write_json(partial / "config.json", content)
            vae.write_json(partial / "rows.json", rows)
            partial.rename(folder)
        except (OSError, UserError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {folder}: {error}") from None
        vae.write_text(run / "best", self.best[1] or folder.name)
        vae.write_text(latest, folder.name)
        self.saved = folder.name
        for old in run.glob("step_[0-9]*"):
            if old.name not in (folder.name, self.best[1]):
                with contextlib.suppress(OSError):  # Windows, while another program reads it
                    half = old.rename(run / f".{old.name}.partial")  # never half a step_N
                    shutil.rmtree(half, ignore_errors=True)

    def advice(self, run):
        """Say how a run that a damaged picture ended goes on."""
        saved = f"{self.saved} is saved: " if self.saved else ""
        return f"{saved}python train.py --resume {run} --data CSV goes on with a mended table"

    def load(self, folder, rows):
        """Load step, scores, averages and moments from a checkpoint, but not the weights.

        rows: content of rows.json now. Scores of other pictures are not kept. Raises UserError for
        a damaged checkpoint."""
        config = model.read_run(folder)
        for key in PROGRESS:
            setattr(self, key, config[key])
        self.saved = folder.name
        before = vae.read_json(folder / "rows.json")
        same = all(before[key] == rows[key] for key in ("measured", "crop"))
        for name in ("degradations", "max_degradations", "seed", "latent_steps"):
            same = same and config["args"][name] == getattr(self.args, name)
        if not same:
            print("validation is on other pictures than before: best begins anew")
            self.best = [0.0, None]
            self.validation = None
        with explain_errors(folder / "ema.safetensors", "this checkpoint"):
            averages = load_file(folder / "ema.safetensors")
        with explain_errors(folder / "optimizer.safetensors", "this checkpoint"):
            moments = load_file(folder / "optimizer.safetensors")
            for name in self.own:
                self.average[name].copy_(shard(averages[name]))
                for key, value in self.moments[name].items():
                    value.copy_(shard(moments[f"{key}.{name}"]))
        for state in self.adamw.state.values():
            state["step"].fill_(self.step)


def is_new(name):
    """Say whether a weight is of a layer that starts at zero, which has a rate of its own."""
    return name.startswith(("projection", "skips"))


def describe(args, config, rows):
    """Return what config.json says of a run, whatever the step."""
    left_out = "given", "typed", "checkpoint", "resume", "out"
    return {
        "model": config,
        "args": {name: value for name, value in vars(args).items() if name not in left_out},
        "given": args.given,
        "held_out": [name for name, _, _ in rows["held_out"]],
    }


# --------------------------------------------------------------------------------------------------
# The three stages share one loop. Each is a class with
#   scored                          the name of what validation scores
#   build()                         a module with unset weights
#   load(checkpoint)                the module to train: a checkpoint's, or (None) the initial one
#   objective(module, batch, step)  a function: slice of the batch -> the loss of each picture
#   make_method(module, dataset)    how a picture of validation is made, for evaluate_pairs
#   config                          "model" of config.json, final after load


class RestorerStage:
    """Train the transformer to restore latents. The autoencoder and the text encoder are frozen."""

    scored = "restored"

    def __init__(self, config, args, train_set, val_set, draws):
        self.config = config
        self.args = args
        self.autoencoder, self.prompts = load_frozen(config, args, train_set, val_set, draws)
        if "proj_lr" in args.given and config["conditioning"] != "projection":
            raise UserError("--proj_lr: no projection is trained here; leave it out")
        # errors in brightness, which no picture tells, would drown all others: see flow_loss
        self.mean_weight = 0.1 if "color_jitter" in train_set.degradation_names() else 1.0

    def build(self):
        return model.build_restorer(self.config)

    def load(self, checkpoint):
        if not checkpoint:
            generator = weights_generator(self.args)
            restorer = model.initial_restorer(self.args.model, self.config, generator)
        elif self.config["lora"]:
            restorer, _ = model.load_restorer(checkpoint, "model", self.config["name"])
        else:
            with torch.device("meta"):
                restorer = self.build()
            restorer.to_empty(device="cpu")
            vae.load_weights(restorer, checkpoint / "model.safetensors")
        restorer.sana.checkpointing = self.args.checkpointing
        return restorer

    def objective(self, module, batch, step):
        """Return losses(some): the loss of each picture in a slice of the batch."""
        args = self.args
        x0 = to_device(batch["clean"], args.device)
        condition = to_device(batch["condition"], args.device)
        if not args.cache:  # else they are latents already
            # DC-AE takes pictures one by one: 0.7 GB each at 512 pixels, and no faster together
            pretrained = self.config["autoencoder"]["kind"] == "pretrained"
            count = len(x0) if pretrained else args.accumulate
            x0 = torch.cat([self.autoencoder.encode(x) for x in x0.chunk(count)])
            condition = torch.cat([self.autoencoder.encode(x) for x in condition.chunk(count)])
        drawn = draw_step(x0.shape[1:], step, args, self.config["shift"])
        noise, sigma, kept = [to_device(t, args.device) for t in drawn]
        # not kept: --condition_dropout, by default of none
        condition = condition * kept[:, None, None, None]
        text, text_mask = self.prompts(batch["caption"])

        def losses(some):
            captions = text[some], None if text_mask is None else text_mask[some]
            latents = x0[some], condition[some]
            drawn = sigma[some], noise[some]
            return model.flow_loss(module, *latents, *captions, *drawn, self.mean_weight)

        return losses

    def make_method(self, module, dataset):
        around = self.autoencoder, self.prompts
        pipeline = evaluate.Pipeline(module, *around, keeps_grey=self.config["keeps_grey"])
        return restoring(pipeline, dataset, self.args)


class AutoencoderStage:
    """Train the preset mini's own autoencoder to return what it is given."""

    scored = "roundtrip"

    def __init__(self, config, args, train_set, val_set, draws):
        self.config = config
        self.args = args
        self.perceptual = load_perceptual(args)

    def build(self):
        return vae.DCAE(self.config["autoencoder"]["dcae"])

    def load(self, checkpoint):
        autoencoder = self.build()
        begun_from = trained_before(self.args, checkpoint)
        if begun_from:
            return vae.load_weights(autoencoder, begun_from)
        return autoencoder.initialize(weights_generator(self.args))

    def objective(self, module, batch, step):
        clean = to_device(batch["clean"], self.args.device)
        return lambda some: vae.reconstruction_loss(module, clean[some], self.perceptual)

    def make_method(self, module, dataset):
        return evaluate.ceiling_method(module, self.args.device)


SKIPS_DROPPED = 0.1  # of the images: so --decoder_weight of evaluate.py can be chosen freely


class DecoderStage:
    """Train the end of the autoencoder's decoder, and the skips that show it the degraded picture.

    It learns on the latents that the frozen restorer makes."""

    scored = "restored"

    def __init__(self, config, args, train_set, val_set, draws):
        self.config = config
        self.args = args
        self.train_set = train_set
        self.autoencoder_folder = Path(args.out) / "autoencoder"
        self.autoencoder, self.prompts = load_frozen(config, args, train_set, val_set, draws)
        self.perceptual = load_perceptual(args)
        # after the text encoder has left the memory
        base = Path(args.out) / "base"
        self.restorer, _ = model.load_restorer(base, name=config["name"])
        if args.device.startswith("cuda") and config["autoencoder"]["kind"] == "pretrained":
            self.restorer.sana.bfloat16()
        self.restorer.to(args.device).requires_grad_(False)

    def build(self):
        about = self.config["decoder"]
        return vae.DCAE(about["dcae"]).add_skips(about["gains"]).freeze_around_decoder()

    def load(self, checkpoint):
        autoencoder = model.load_autoencoder(self.config, self.autoencoder_folder)
        about = self.config["decoder"] or self.measure(autoencoder.to(self.args.device))
        self.config = self.config | {"decoder": about | {"steps": self.args.latent_steps}}
        autoencoder.add_skips(about["gains"]).freeze_around_decoder()
        begun_from = trained_before(self.args, checkpoint)
        if begun_from:
            vae.load_weights(autoencoder, begun_from, trained=True)
        return autoencoder

    def measure(self, autoencoder):
        """Return the "decoder" of a config.json, with the factors of its skips."""
        count = min(4, self.args.batch_size)
        batch = data.collate([self.train_set[n] for n in range(count)])
        batch["caption"] = [""] * count  # which every process has encoded
        latents = self.restore_latents(batch, slice(None))
        try:
            autoencoder.add_skips()
        except ValueError as error:
            raise UserError(f"--stage decoder: {error}") from None
        gains = autoencoder.measure_gains(latents, batch["condition"].to(self.args.device))
        return {"dcae": autoencoder.config, "gains": first_does(lambda: gains)}  # GPUs round apart

    @torch.no_grad()
    def restore_latents(self, batch, some):
        """Return the latents that the restorer makes of pictures of a batch, [b, C, H/f, W/f].

        The noise of each draw depends on its number alone, so any number of processes see the same.
        0 steps: the latents of the condition itself."""
        args = self.args
        condition = self.autoencoder.encode(to_device(batch["condition"][some], args.device))
        if args.latent_steps == 0:
            return condition
        noise = []
        for n in batch["draw"][some]:
            generator = torch.Generator().manual_seed(seed_for(args.seed, n, "latents"))
            noise.append(torch.randn(condition.shape[1:], generator=generator))
        noise = to_device(torch.stack(noise), args.device)
        prompt = self.prompts(batch["caption"][some])
        velocity = model.guided(self.restorer, condition, prompt, None)
        return model.sample_euler(velocity, noise, args.latent_steps, self.restorer.shift)

    def objective(self, module, batch, step):
        device = self.args.device
        clean, degraded = to_device(batch["clean"], device), to_device(batch["condition"], device)
        weight = torch.ones(len(clean), 1, 1, 1)
        for i, n in enumerate(batch["draw"]):
            generator = torch.Generator().manual_seed(seed_for(self.args.seed, n, "skips"))
            if torch.rand((), generator=generator) < SKIPS_DROPPED:
                weight[i] = 0
        weight = to_device(weight, device)

        def losses(some):
            latents = self.restore_latents(batch, some)
            inputs = latents, degraded[some], clean[some], weight[some]
            return vae.decoder_loss(module, *inputs, self.perceptual)

        return losses

    def make_method(self, module, dataset):
        around = module, self.prompts
        about = {"keeps_grey": self.config["keeps_grey"], "steps": self.args.latent_steps}
        pipeline = evaluate.Pipeline(self.restorer, *around, **about)
        return restoring(pipeline, dataset, self.args)


STAGES = {"autoencoder": AutoencoderStage, "restorer": RestorerStage, "decoder": DecoderStage}


def load_frozen(config, args, train_set, val_set, draws):
    """Load the frozen autoencoder and the Prompts, with all captions of the run encoded.

    So the text encoder has left the memory when training begins. draws: the numbers of all pictures
    that this process will draw."""
    autoencoder = model.load_autoencoder(config, Path(args.out) / "autoencoder").to(args.device)
    prompts = model.Prompts(config, args.device)
    model.check_resolution(sides_of(args), autoencoder)
    if args.cache:
        prompts.known = train_set.prompts()
    elif not prompts.hashed:
        prompts.prepare(data.captions_of(train_set, draws, val_set))
    return autoencoder, prompts


def load_perceptual(args):
    """Load LPIPS from the local files of --lpips_weights; None without them."""
    if not args.lpips_weights:
        return None
    if min(sides_of(args)) < 64:
        raise UserError("--lpips_weights: LPIPS needs crops of 64 pixels; see --resolution")
    trunk, heads = args.lpips_weights
    trunk = evaluate.read_published(evaluate.LPIPS_TRUNK, trunk)
    heads = evaluate.read_published(evaluate.LPIPS_HEADS, heads)
    return evaluate.LPIPS(trunk, heads).to(args.device)


def trained_before(args, checkpoint):
    """Return the weights that an autoencoder or a decoder begins with: a file, or None."""
    if checkpoint:
        return checkpoint / "model.safetensors"
    if model.stage_of(args.model) == args.stage:
        return model.find_checkpoint(args.model) / "ema.safetensors"
    return None


def weights_generator(args):
    return torch.Generator().manual_seed(seed_for(args.seed, 0, "weights"))


def restoring(pipeline, dataset, args):
    captions = [dataset.plan(i).caption for i in range(len(dataset))]
    return evaluate.restoring_method(pipeline, captions, args.device, seed=args.seed)


# --------------------------------------------------------------------------------------------------
# The loop and its parts.

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
    sigma = model.draw_sigma(args.batch_size, generator, args.share_at_one, shift)
    kept = torch.rand(args.batch_size, generator=generator) >= args.condition_dropout
    mine = slice(RANK, None, WORLD)
    return noise[mine], sigma[mine], kept[mine]


class Lanes:
    """Threads that compute a part of the batch each, on a CPU.

    By default torch divides each operation among its threads. A step has a thousand small
    operations. After each one the threads spin until all are done, and one is late if another
    program uses its core. A pretrained model has large operations: one lane, so that only one set
    of gradients is held."""

    def __init__(self, config, args):
        self.count = 1
        pretrained = config["autoencoder"]["kind"] == "pretrained"
        if args.device == "cpu" and WORLD == 1 and not pretrained:
            self.count = min(torch.get_num_threads(), args.batch_size // args.accumulate)
        threads = torch.get_num_threads() // self.count
        self.pool = ThreadPoolExecutor(self.count, initializer=begin_lane, initargs=[threads])

    def add_gradients(self, losses, weights, pieces, batch_size):
        """Add the gradients of slices of a batch to the weights -> the loss of each slice, [].

        Gradients are added in the order of the slices, so that the sum is reproducible."""

        def compute(piece):
            loss = losses(piece).sum()
            return loss.detach(), torch.autograd.grad(loss / batch_size, weights)

        sums = []
        for loss, gradients in self.pool.map(compute, pieces):
            sums.append(loss)
            for p, gradient in zip(weights, gradients):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)  # in the layout of p, as the optimizer expects
                p.grad.add_(gradient)
        return sums


def begin_lane(threads):
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # as main does


def compute_gradients(state, stage, batch, lanes):
    """Add the gradients of a batch to the weights -> the summed loss of each part, [].

    bf16 gradients of parts are summed in bf16. With 4 parts that changes them by 0.25%, with 16 by
    0.4%; those of bf16 are off by 1.2% anyway. (With several processes FSDP sums them in fp32, and
    each holds them whole: 4 bytes a weight.)"""
    args = state.args
    losses = stage.objective(state.module, batch, state.step)
    count = args.accumulate * lanes.count
    sums = []
    # 2 accumulated passes of 2 lanes: pictures 0, 4, .. and 2, 6, .., then 1, 5, .. and 3, 7, ..
    for i in range(args.accumulate):
        pieces = [slice(k, None, count) for k in range(i, count, args.accumulate)]
        if lanes.count > 1:
            weights = list(state.weights.values())
            sums += lanes.add_gradients(losses, weights, pieces, args.batch_size)
        else:
            if WORLD > 1:  # the processes add up their gradients once, after the last part
                state.module.set_requires_gradient_sync(i == args.accumulate - 1)
            loss = losses(pieces[0]).sum()
            # the mean over the batch: its pieces add up, and FSDP averages over the processes
            (loss * WORLD / args.batch_size).backward()
            sums.append(loss.detach())
    return sums


def train_step(state, stage, batch, lanes, stop=()):
    """Do one step with a batch -> its mean loss, the norm of its gradient, whether to stop.

    All are over all processes. A step whose loss or norm is not finite changes nothing."""
    args = state.args
    losses = compute_gradients(state, stage, batch, lanes)
    norms = state.collect_gradients()
    numbers = torch.stack([*losses, *norms]).tolist()  # one process waits for its GPU only here
    total = sum(numbers[: len(losses)])
    square = sum(norm**2 for norm in numbers[len(losses) :])
    numbers = [total, square, float(bool(stop))]
    total, square, stopped = sum_over_processes(numbers, args.device)
    loss, norm = total / args.batch_size, math.sqrt(square)
    if math.isfinite(loss + norm):
        state.update(min(1.0, args.clip / (norm + 1e-6)) if args.clip else 1.0)
    else:
        state.skip()
    state.clear_gradients()
    return loss, norm, bool(stopped)


# SIGHUP: the terminal was closed; Windows has none
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


def catch_signals():
    """Return a list to which the first Ctrl-C, SIGTERM or SIGHUP is added instead of killing."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one is the system's

    for name in SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(name, note)
    return caught


def validate(state, stage, dataset, run):
    """Restore the held-out pictures with the averaged weights, and draw them.

    -> a line of the log: the mean PSNR and SSIM of input and restored. Fixed pairs, fixed noise.
    The first process does it and tells the others."""
    module = state.averaged_module(stage.build)

    def measure():
        metrics = evaluate.Metrics(["psnr", "ssim"])
        methods = {stage.scored: stage.make_method(module, dataset)}
        rows, pictures = evaluate.evaluate_pairs(dataset, methods, metrics, quiet=True)
        path = run / f"samples/step_{state.step:06d}.png"
        degrade.save_image(evaluate.draw_grid(pictures), path)
        return {"step": state.step} | evaluate.means(rows)

    return first_does(measure)


def train(state, stage, batches, val_set, run, rows):
    """Do the steps that are left, with log, validation and checkpoints.

    -> the signal that ended it before the last step, or None. Raises UserError."""
    args = state.args
    scored = f"{stage.scored}_psnr"
    lanes = Lanes(stage.config, args)
    stop = catch_signals()
    failures = 0
    losses, waited, seconds = [], 0.0, 0.0
    last = False
    options = {"unit": "step", "smoothing": 0.05, "disable": RANK > 0}
    with tqdm(total=args.steps, initial=state.step, **options) as bar:
        while not last:
            before = time.monotonic()
            try:
                batch = next(batches)
            except UserError as error:  # a damaged picture
                if WORLD == 1:  # else the last checkpoint stands
                    state.save(run, stage.config, rows, scored)
                raise UserError(f"{error}; {state.advice(run)}") from None
            waited += time.monotonic() - before
            loss, norm, stopped = train_step(state, stage, batch, lanes, stop)
            losses.append(loss)
            seconds += time.monotonic() - before
            failures = 0 if math.isfinite(loss + norm) else failures + 1
            if failures:
                bar.write(f"step {state.step}: loss {loss}, gradient norm {norm}: skipped")
            bar.update()

            # the end: all steps are done, a signal came to some process, or nothing works any more
            done = state.step == args.steps
            last = done or stopped or failures == MOST_FAILURES
            if last or state.step % LOG_EVERY == 0:
                line = describe_steps(state, losses, norm, waited, seconds)
                add_line(run, line)
                losses, waited, seconds = [], 0.0, 0.0
                bar.set_postfix({"loss": line["loss"], "val_dB": state.validation[scored]})
            if done or state.step % args.val_every == 0:
                state.validation = validate(state, stage, val_set, run)
                add_line(run, state.validation)
            if last or state.step % args.save_every == 0:
                state.save(run, stage.config, rows, scored)
                draw_log(run)
    if failures == MOST_FAILURES:
        advice = f"the weights are saved, lower --lr ({args.lr:g})"
        raise UserError(f"{MOST_FAILURES} steps in a row without a finite loss; {advice}")
    if done:
        return None
    return stop[0] if stop else signal.SIGTERM  # of another process


def describe_steps(state, losses, norm, waited, seconds):
    """Return a line of the log: the steps since the line before it.

    seconds: what they took. waited: how much of it for pictures."""
    args = state.args
    finite = [loss for loss in losses if math.isfinite(loss)]
    line = {
        "step": state.step,
        "loss": sum(finite) / max(1, len(finite)),
        "norm": norm,
        "images_per_second": len(losses) * args.batch_size / seconds,
        "data_wait": waited / seconds,
        "skipped": state.skipped,
    }
    if args.device.startswith("cuda"):
        line["memory_gb"] = torch.cuda.max_memory_allocated(args.device) / 2**30
    return line


def add_line(run, line):
    """Add a line to log.jsonl."""
    if RANK == 0:
        with open(run / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(vae.strict_json(line) + "\n")


def read_log(run):
    """Return the lines of log.jsonl."""
    lines = []
    if (run / "log.jsonl").is_file():
        for text in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # it was being written when the machine went down
                lines.append(json.loads(text))
    return lines


CURVES = {
    "loss": "training loss",
    "restored_psnr": "validation PSNR, dB",
    "roundtrip_psnr": "validation PSNR of the round trip, dB",
}


def draw_log(run):
    """Draw loss.png."""
    if RANK > 0:
        return
    lines = read_log(run)
    charts = []
    for key, title in CURVES.items():
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            charts.append((title, points, key == "loss"))
    with contextlib.suppress(UserError):  # Windows, while a viewer shows it
        evaluate.draw_charts(charts, run / "loss.png")


# --------------------------------------------------------------------------------------------------
# From flags to a run.


def describe_run(args):
    """Return "model" of config.json, steps done, and pictures drawn. Raises UserError."""
    if not args.checkpoint:
        about = args.stage, args.conditioning, args.lora, args.shift
        return model.describe_model(args.model, *about), 0, 0
    saved = model.read_run(args.checkpoint)
    if saved["step"] >= args.steps:
        at = f"{args.out} is at step {saved['step']} of {args.steps} already"
        raise UserError(f"{at}: --{'curriculum' if args.curriculum else 'steps'} sets the end")
    config = saved["model"]
    if "model" in args.typed:  # where a pretrained model is now
        config["name"] = model.full_name(args.model)
    return config, saved["step"], saved["drawn"]


def sides_of(args):
    """Return all sides of crops that a run has."""
    return [args.resolution] + [side for side, _ in args.curriculum or []]


def crop_sides(args, step, drawn):
    """Return the side of crops as PairedDataset takes it: with --curriculum [(last draw, side)].

    step, drawn: steps done and pictures drawn so far."""
    if not args.curriculum:
        return args.resolution
    sides = []
    end = -step
    for side, steps in args.curriculum:
        end += steps
        sides.append((drawn + end * args.batch_size, side))
    return sides


def load_data(args, step, drawn):
    """Open the pairs -> training set, validation set, rows.json. Raises UserError.

    step, drawn: steps done and pictures drawn so far."""
    begun = {"trained": [], "held_out": []}
    if args.checkpoint:
        begun = vae.read_json(args.checkpoint / "rows.json")
    before = model.rows_trained_on(args.checkpoint or args.model)
    crop = crop_sides(args, step, drawn)
    how = crop, data.draw_flags(vars(args)), args.skip_bad, before, begun["held_out"]
    train_set, val_set, held_out = data.make_datasets(args.data, args.val_data, *how)
    if args.data:
        given = args.typed if args.checkpoint else args.given
        data.refuse_useless_flags(given, train_set.source, val_set.source)
    rows = {"trained": data.list_rows(train_set), "held_out": held_out}
    rows |= {"measured": data.list_rows(val_set), "crop": val_set.crop}
    # of other weights, and of a table that has changed since
    rows["before"] = sorted(before - {digest for _, digest, _ in rows["trained"]})
    if args.checkpoint and "data" not in args.typed:
        what = f"{args.out} began with other pictures"
        if args.data:
            what += "; --data, given again, goes on with these"
        for key in ("trained", "held_out"):
            data.check_same(begun[key], rows[key], what)
    return train_set, val_set, rows


def claim_run(args):
    """Make the folder of a new run, unless a start that was killed has left it. Raises UserError.

    -> whether it is new."""
    run = Path(args.out)
    if args.resume and (run / "config.json").is_file():
        return False
    degrade.make_folder(run)
    vae.write_json(run / "config.json", {"given": args.given})
    return True


def try_folder(run):
    """Write, rename and remove a folder, as each checkpoint will. Raises UserError."""
    written, renamed = run / ".step_try.partial", run / ".step_tried.partial"
    shutil.rmtree(renamed, ignore_errors=True)  # of a start that was killed
    vae.write_json(written / "config.json", {})
    try:
        written.rename(renamed)
        shutil.rmtree(renamed)
    except OSError as error:
        raise UserError(f"{run}: a checkpoint cannot be renamed or removed here: {error}") from None


def run_training(args, config, train_set, val_set, rows, draws):
    """Train -> the State and the signal that ended it, or None. Raises UserError.

    draws: the numbers of the pictures that this process draws."""
    run = Path(args.out)
    stage = STAGES[args.stage](config, args, train_set, val_set, draws)
    state = State(stage.load(args.checkpoint), args)
    if args.checkpoint:
        state.load(args.checkpoint, rows)
    if RANK == 0:
        begin_files(run, state, stage, rows)
    introduce(args, state, len(train_set))
    if torch.cuda.is_initialized():  # it is if --device is a GPU
        torch.cuda.reset_peak_memory_stats()  # from here on it is that of training
    batches = data.load_batches(train_set, args.batch_size // WORLD, draws, args.workers)
    try:
        if not state.validation:
            state.validation = validate(state, stage, val_set, run)
            add_line(run, state.validation)
        return state, train(state, stage, batches, val_set, run, rows)
    finally:
        batches.close()  # ends the threads


def begin_files(run, state, stage, rows):
    """Write config.json, and what log.jsonl holds up to the step from which the run goes on."""
    vae.write_json(run / "config.json", describe(state.args, stage.config, rows))
    lines = []
    if state.args.checkpoint:
        lines = [line for line in read_log(run) if line["step"] <= state.step]
    vae.write_text(run / "log.jsonl", "".join(vae.strict_json(line) + "\n" for line in lines))


def introduce(args, state, images):
    """Print what is about to be done."""
    count = sum(p.numel() for p in state.weights.values()) / 1e6
    where = f"{WORLD} x {args.device}" if WORLD > 1 else args.device
    steps = args.steps - state.step
    trained = "" if args.stage == "restorer" else f", --stage {args.stage}"
    print(f"model {args.model}{trained}, {count:.2f} M parameters, on {where}")
    work = f"{steps} steps of {args.batch_size} crops of {args.resolution} pixels"
    print(f"{work} from {images} images -> {args.out}")


def report(state, method, run, count):
    """Print the last lines: what was reached, and where it lies."""
    v = {key: math.nan if value is None else value for key, value in state.validation.items()}
    psnr, ssim = f"{v[f'{method}_psnr']:.2f} dB", f"{v[f'{method}_ssim']:.3f}"
    if method == "restored":
        psnr = f"{v['input_psnr']:.2f} -> {psnr}"
        ssim = f"{v['input_ssim']:.3f} -> {ssim}"
    word = "validated" if v["step"] == state.step else "last validated"  # after a stop
    print(f"{word} at step {v['step']} on {count} images: PSNR {psnr}, SSIM {ssim}")
    print(f"degraded | {method} | clean: {run}/samples/step_{v['step']:06d}.png")
    print(f"{run}/loss.png, log.jsonl, checkpoint step_{state.step:06d}")


def main():
    torch.set_flush_denormal(True)  # silu's gradient has denormals; they slow a CPU 100-fold
    sys.setswitchinterval(5e-4)  # so that lanes soon go on beside the thread that prepares pictures
    if WORLD > 1 and torch.cuda.device_count() > LOCAL_RANK:
        torch.cuda.set_device(LOCAL_RANK)  # before anything is put on a GPU: "cuda" is this one
    args = parse_args()
    data.use_device(args.device)
    start_processes(args)
    run = Path(args.out)
    config, step, drawn = first_does(lambda: describe_run(args))
    train_set, val_set, rows = first_does(lambda: load_data(args, step, drawn))
    config |= train_set.source.about_conditions()
    if args.cache:
        about = data.fingerprint(config, data.draw_flags(vars(args)), args.resolution)
        train_set = data.CachedDataset(args.cache, about, train_set)
    # every draw of the run has a number; this process takes every WORLD-th
    last = drawn + (args.steps - step) * args.batch_size
    draws = range(drawn + RANK, last, WORLD)
    made = not args.checkpoint and first_does(lambda: claim_run(args))
    try:
        first_does(lambda: try_folder(run))
        if not args.checkpoint:
            first_does(lambda: model.link_parts(args.model, config, run))
        state, caught = run_training(args, config, train_set, val_set, rows, draws)
    except BaseException:
        if made and RANK == 0 and not (run / "latest").exists():
            shutil.rmtree(run, ignore_errors=True)  # nothing was learnt: leave no trace
        raise
    report(state, STAGES[args.stage].scored, run, len(val_set))
    if caught:
        stopped = f"stopped at step {state.step} of {args.steps}"
        print(f"{stopped}: python train.py --resume {run} goes on")
        if state.step < state.average_every:
            moves = f"the average moves every {state.average_every} steps (--ema_device)"
            print(f"{moves}, and not yet: what restores are the initial weights")
    status = 128 + caught if caught else 0
    if WORLD > 1:
        # gloo's threads may still hold tensors, and would abort a Python that is shutting down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if caught:
        sys.exit(status)


if __name__ == "__main__":
    run_script(main)
