"""exit_stats, kv_fill and ragged_attention on a GPU beside one read of what they read, torch and installed peers.

    python benchmarks/bench_cuda.py [--out FILE]    the tables
    python benchmarks/bench_cuda.py --small         each kernel once on small shapes, for compute-sanitizer

Medians of CUDA events, inputs of all contenders read anew from memory (a buffer larger than any L2 is written between
two runs), contenders interleaved. "x read" is our time over that of reading the head once at the rate of a device copy.
Other columns are the contender's time over ours: above 1, exeunt is faster. "linear alone" is torch's product alone,
"fp8 head" exeunt with an Fp8Head: below 1, that is faster. Liger and Cut Cross-Entropy compute a loss,
FlashInfer top-k of logits that torch multiplies: less than the statistics that exit_stats leaves.

kv_fill: all of 28 layers skipped, keys and values of N rows; beside it the layers' own work in torch. Both also as they
replay in a CUDA graph, without the Python around them: "x read" is the graph's time over that of reading the weights.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import statistics
import subprocess
from pathlib import Path

import torch
from torch.nn import functional as F

import bench_cuda_attention
import exeunt
from exeunt import ExitStats, ops
from exeunt.ops import KVCache, KVLayer, KVStack

#: Heads, and the numbers of rows to measure with each: torch.compile takes seconds for every one.
SHAPES = {
    (128_256, 4096): [1, 4, 16, 64, 256, 1024, 4096],
    (32_000, 4096): [1, 16, 64, 1024],
    (49_152, 576): [1, 16, 64],
}
EPS = 1e-5

#: kv_fill: layers, D, key and value heads, their size; and the numbers of rows.
LAYERS, WIDTH, HEADS, SIZE = 28, 4096, 8, 128
ROWS = [1, 4, 16, 64, 512]


def eager(hidden, head, weight):
    """What a user writes: norm, linear, then statistics of the float32 logits."""
    logits = F.linear(F.rms_norm(hidden, hidden.shape[1:], weight, EPS), head).float()
    top = logits.topk(2, dim=-1)
    log_probs = torch.log_softmax(logits, -1)
    return top.indices[:, 0], top.values, -(log_probs.exp() * log_probs).sum(-1)


def fused(hidden, head, weight):
    return ops.exit_stats(hidden, head, norm="rms", norm_weight=weight, eps=EPS)


def peers(target):
    """Contenders by name, those that are installed."""
    found = {"torch eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    found["linear alone"] = lambda hidden, head, weight: F.linear(hidden, head)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["Cut Cross-Entropy"] = lambda hidden, head, weight: linear_cross_entropy(hidden, head, target)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        found["Liger"] = lambda hidden, head, weight: fused_linear_cross_entropy_forward(hidden, head, target)
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        found["FlashInfer"] = lambda hidden, head, weight: flashinfer.top_k(F.linear(hidden, head), 2)
    return found


def interleaved(contenders, budget=0.5):
    """Median milliseconds of each, or the error that it raised."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times, failed = {name: [] for name in contenders}, {}
    for name, run in contenders.items():
        try:
            run()  # compiles
            run()
        except Exception as error:
            failed[name] = type(error).__name__
    spent = 0.0
    while spent < budget * 1000 and len(next(iter(times.values()))) < 30:
        for name, run in contenders.items():
            if name in failed:
                continue
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
            spent += times[name][-1]
    return {name: failed.get(name) or statistics.median(found) for name, found in times.items()}


def kv_fill_sides(n, layers=LAYERS, width=WIDTH, heads=HEADS, size=SIZE, dtype=torch.bfloat16):
    """kv_fill for n rows that skipped all layers, and a loop over the layers in torch; both write the same places."""

    def made(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    own = [KVLayer(*(made(heads, size, width, scale=width**-0.5) for _ in "kv"), norm_weight=made(width))
           for _ in range(layers)]  # fmt: skip
    stack = KVStack(own, norm="rms", eps=EPS)
    keys, values = ([torch.zeros(8, heads, n // 8 + 1, size, device="cuda", dtype=dtype) for _ in own] for _ in "kv")
    cache, hidden, every = KVCache(keys, values), made(n, width), torch.arange(n, device="cuda")
    first, rows, slots, (cos, sin) = torch.zeros_like(every), every % 8, every // 8, made(2, n, size)

    def ours():
        ops.kv_fill(hidden, first, rows, slots, stack, cache, rotary=(cos, sin))

    def loop():
        for layer, key_cache, value_cache in zip(own, keys, values, strict=True):
            x = F.rms_norm(hidden, (width,), layer.norm_weight, EPS)
            key = F.linear(x, layer.key.view(-1, width)).view(n, heads, size)
            a, b = key.chunk(2, -1)
            key_cache[rows, :, slots] = key * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]
            value_cache[rows, :, slots] = F.linear(x, layer.value.view(-1, width)).view(n, heads, size)

    return ours, loop, keys + values


def captured(run):
    """Its replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kv_fill_table():
    shape = f"kv_fill, {LAYERS} layers, D={WIDTH}, {HEADS} x {SIZE}, bf16"
    yield f"| {shape}: N | ms | graph ms | x read | loop | loop graph |"
    yield "|---|---|---|---|---|---|"
    nbytes = 2 * LAYERS * WIDTH * HEADS * SIZE * 2
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    read = interleaved({"copy": lambda: target.copy_(source)})["copy"] / 2
    for n in ROWS:
        ours, loop, _ = kv_fill_sides(n)
        sides = {"ours": ours, "loop": loop, "graph": captured(ours), "loop graph": captured(loop)}
        got = interleaved(sides)
        if any(isinstance(time, str) for time in got.values()):
            raise SystemExit(f"kv_fill's benchmark failed: {got}, N={n}")
        alone, graph = got["ours"], got["graph"]
        yield (
            f"| {n} | {alone:.3f} | {graph:.3f} | {graph / read:.2f} | {got['loop'] / alone:.2f} "
            f"| {got['loop graph'] / graph:.2f} |"
        )


def table():
    columns = ["torch eager", "torch.compile", "linear alone", "Cut Cross-Entropy", "Liger", "FlashInfer"]
    yield f"| V x D, bf16 | N | exeunt ms | x read | TFLOP/s | fp8 head | {' | '.join(columns)} |"
    yield "|---" * (6 + len(columns)) + "|"
    for (v, d), counts in SHAPES.items():
        head = (torch.randn(v, d, device="cuda") / d**0.5).bfloat16()
        weight = torch.ones(d, device="cuda", dtype=torch.bfloat16)
        narrow, copy = ops.Fp8Head(head), torch.empty_like(head)
        read = interleaved({"copy": lambda copy=copy, head=head: copy.copy_(head)})["copy"] / 2
        for n in counts:
            hidden = torch.randn(n, d, device="cuda").bfloat16()
            target = torch.zeros(n, dtype=torch.int64, device="cuda")
            contenders = {
                name: lambda run=run, hidden=hidden, head=head, weight=weight: run(hidden, head, weight)
                for name, run in {"exeunt": fused, **peers(target)}.items()
            }
            contenders["fp8"] = lambda hidden=hidden, narrow=narrow, weight=weight: fused(hidden, narrow, weight)
            got = interleaved(contenders)
            ours, fp8 = got.pop("exeunt"), got["fp8"]
            if isinstance(ours, str) or isinstance(fp8, str):
                raise SystemExit(f"exit_stats failed with {ours}, with an Fp8Head {fp8}: V={v}, D={d}, N={n}")
            rate = 2e-9 * n * v * d / ours  # TFLOP/s
            cells = [got.get(name, "absent") for name in columns]
            shown = " | ".join(c if isinstance(c, str) else f"{c / ours:.2f}" for c in cells)
            yield f"| {v} x {d} | {n} | {ours:.3f} | {ours / read:.2f} | {rate:.0f} | {fp8 / ours:.2f} | {shown} |"
            torch.compiler.reset()


def small():
    """Every kernel once: dtypes, blocks of rows, aligned and unaligned heads, all variants, the other ops."""
    mask = torch.arange(300, device="cuda") % 3 == 0
    rows, count, x = ops.compact(mask, torch.randn(300, 8, device="cuda"))
    ops.expand(rows, count, x, torch.zeros_like(x))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, pooler = torch.randn(9, 40, device="cuda", dtype=dtype), torch.randn(50, 40, device="cuda", dtype=dtype)
        ops.small_head(x, pooler[:3].repeat(1, 2)[:, :50].contiguous(), pooler_weight=pooler, norm="layer")
        ops.saturation(x, x)
        if dtype != torch.float32:
            head = ops.Fp8Head(torch.randn(130, 40, device="cuda"))
            for n in (9, 20):
                ops.exit_stats(torch.randn(n, 40, device="cuda", dtype=dtype), head)
    bench_cuda_attention.small()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, size in ((3, 24), (20, 128), (3, 256)):
            ours, loop, cache = kv_fill_sides(n, 2, 72, 2, size, dtype)
            ours()
            found = [t.clone() for t in cache]
            loop()
            for got, want in zip(found, cache, strict=True):
                torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
        for n, v, d in [(1, 300, 64), (12, 130, 33), (20, 260, 72), (70, 129, 96)]:
            hidden, head = torch.randn(n, d).to("cuda", dtype), torch.randn(v, d).to("cuda", dtype)
            every = torch.arange(n, device="cuda")
            stats = ops.exit_stats(hidden, head, norm="rms", topk=3, seeds=every, target=every % v,
                                   rows=every.flip(0), count=torch.tensor(n, device="cuda"),
                                   logits_out=torch.empty(n, v, device="cuda"))  # fmt: skip
            expected = ExitStats.from_logits(
                F.linear(F.rms_norm(hidden.float(), (d,), None, 1e-6).to(dtype).float(), head.float())
            )
            torch.testing.assert_close(stats.top1, expected.top1.flip(0), rtol=1e-2, atol=1e-2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the table goes to")
    parser.add_argument("--small", action="store_true", help="run small shapes once and stop")
    asked = parser.parse_args()
    if asked.small:
        return small()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# exit_stats, kv_fill and ragged_attention on CUDA",
        "",
        f"{torch.cuda.get_device_name()}, driver {driver or 'unknown'}, torch {torch.__version__}, "
        f"exeunt {exeunt.__version__}, {datetime.date.today()}. `benchmarks/gpu.sh`; what the columns mean stands in "
        "`benchmarks/bench_cuda.py` and `bench_cuda_attention.py`.",
        "",
    ]
    attention = bench_cuda_attention.table(interleaved, captured)
    for line in itertools.chain(kv_fill_table(), [""], attention, [""], table()):
        print(line, flush=True)
        lines.append(line)
        if asked.out:  # after each line: what was measured stays, should the time run out
            part = asked.out.with_suffix(".part")
            part.write_text("\n".join(lines) + "\n")
            part.replace(asked.out)
    return None


if __name__ == "__main__":
    main()
