"""Ours beside the peers, in one process, interleaved, same weights and inputs: python tests/bench.py [--quick] [optimizer|memory ...]

optimizer  a step of AdamW in bf16: time, and bytes a parameter that stay between steps (weight, gradient, state)
memory     what training takes on a GPU, derived from the shapes alone (nothing is allocated)
"""
import argparse
import statistics
import time

import optimi
import torch
import torchao.optim

import conftest  # noqa: F401, puts the project on the path
from model import Restorer, Sana
from train import BF16AdamW, join_fp32

SANA_1_6B = dict(qk_norm="rms_norm_across_heads", sample_size=32)  # over SANA_DEFAULTS, which are its own


def interleaved(runs, rounds):
    """{name: function} -> {name: median seconds}, one call of each in turn; the first round only warms up."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def bench_optimizer(quick):
    count, lr = (4_000_000 if quick else 100_000_000), 1e-3
    shapes = [(count // 20,)] * 20
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16().float() for i, shape in enumerate(shapes)]
    gradients = [(0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(100 + i))).bfloat16() for i, shape in enumerate(shapes)]

    def make(dtype, optimizer):
        parameters = [torch.nn.Parameter(w.to(dtype)) for w in start]
        for p, g in zip(parameters, gradients):
            p.grad = g.to(dtype, copy=True)  # a peer writes into its gradients
        return parameters, optimizer(parameters)
    same = dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    contestants = {
        "adamw: torch, fp32, fused": make(torch.float32, lambda p: torch.optim.AdamW(p, lr, fused=True, **same)),
        "adamw_bf16: ours, exact": make(torch.bfloat16, lambda p: BF16AdamW([{"params": p, "lr": lr}], **same)),
        "adamw_bf16: ours, compiled": make(torch.bfloat16, lambda p: BF16AdamW([{"params": p, "lr": lr}], **same, compile=True)),
        "adamw_sr: ours": make(torch.bfloat16, lambda p: BF16AdamW([{"params": p, "lr": lr}], **same, exact=False)),
        "optimi AdamW, Kahan": make(torch.bfloat16, lambda p: optimi.AdamW(p, lr, **same, kahan_sum=True)),
        "torchao AdamW, stochastic rounding": make(torch.bfloat16, lambda p: torchao.optim._AdamW(p, lr, **same, bf16_stochastic_round=True)),
    }
    steps = dict.fromkeys(contestants, 0)

    def step(name):
        parameters, optimizer = contestants[name]
        steps[name] += 1
        optimizer.step(*([steps[name], dict.fromkeys(parameters, steps[name])] if isinstance(optimizer, BF16AdamW) else []))
    seconds = interleaved({name: (lambda name=name: step(name)) for name in contestants}, 3 if quick else 5)
    reference = torch.cat([p.detach().float() for p in contestants["adamw: torch, fp32, fused"][0]])
    print(f"{count / 1e6:.0f} M parameters, {torch.get_num_threads()} threads, {steps['adamw_sr: ours']} steps at lr {lr:g}")
    print(f"{'optimizer':36} ms/step  bytes  mean |weight - fp32 AdamW's|")
    for name, (parameters, optimizer) in contestants.items():
        state = sum(t.nbytes for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t) and t.numel() > 1)
        size = (sum(p.nbytes + p.grad.nbytes for p in parameters) + state) / count
        low = [optimizer.state[p].get("low") for p in parameters]  # ours alone has them
        exact = [p.detach().float() if bits is None else join_fp32(p.detach(), bits) for p, bits in zip(parameters, low)]
        error = (torch.cat(exact) - reference).abs().mean().item()
        print(f"{name:36} {1000 * seconds[name]:7.0f}  {size:5.1f}  {error:.2e}")


def saved_bytes(config, grid, batch, tokens=64):
    """Bytes that autograd keeps between the forward and the backward pass of a bf16 transformer; on the meta device."""
    with torch.device("meta"):
        restorer = Restorer(Sana(config))
        restorer.sana.to(torch.bfloat16)
        c, kept = restorer.sana.config, {}
        own = {p.untyped_storage()._cdata for p in restorer.parameters()}

        def pack(t):
            if t.untyped_storage()._cdata not in own:
                kept[t.untyped_storage()._cdata] = t
            return t
        latents = torch.empty(batch, c["out_channels"], *grid)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            restorer(latents, latents, torch.empty(batch), torch.empty(batch, tokens, c["caption_channels"]), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def bench_memory(quick):
    gb = 1e9
    for name, layers, processes in (("SANA1.5 1.6B, one GPU", 20, 1), ("SANA1.5 4.8B, 8 GPUs", 60, 8)):
        config = SANA_1_6B | {"num_layers": layers}
        with torch.device("meta"):
            count = sum(p.numel() for p in Sana(config).parameters())
        print(f"{name}: {count:,} parameters; GB a GPU")
        print(f"  weights, bf16 {2 * count / gb:.1f} · gradients, bf16 {2 * count / gb:.1f} · low bits {2 * count / processes / gb:.1f} · moments, bf16 "
              f"{4 * count / processes / gb:.1f} · average, fp32 {4 * count / processes / gb:.1f} (or 0, with --ema_device cpu) · DC-AE, fp32 1.2 (or 0, with --cache)")
        fixed = (4 * count + 6 * count / processes) / gb
        for side, batch in ((512, 4), (1024, 4)):
            grid = side // 32, side // 32
            one, two = (saved_bytes(config | {"num_layers": n}, grid, batch) for n in (1, 2))
            block, ends = two - one, 2 * one - two
            inputs = batch * grid[0] * grid[1] * 2240 * 2
            plain, again = (ends + layers * block) / gb, (ends + layers * inputs + block) / gb
            print(f"  {side} px, {batch} images a GPU: activations {plain:.1f}, with --checkpointing {again:.1f}; in all, average on the CPU and "
                  f"cached: {fixed + plain:.1f}, {fixed + again:.1f}; with both on the GPU {fixed + 4 * count / processes / gb + 1.2 + plain:.1f}, "
                  f"{fixed + 4 * count / processes / gb + 1.2 + again:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["optimizer", "memory"], choices=["optimizer", "memory"])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    args = parser.parse_args()
    for what in args.what:
        {"optimizer": bench_optimizer, "memory": bench_memory}[what](args.quick)
