"""A decoding step with early exits in CUDA graphs, beside the same step at full depth in one graph.

    python benchmarks/bench_cuda_step.py [--out FILE]    on a GPU; the table is appended to FILE

CALM's step on a Llama-like decoder of random weights: at each exit the check reads the head (``ops.exit_stats``), rows
that leave keep its token, others move together (``ops.compact``), and keys and values of the layers that a row skips
come from its exit state. Each piece is captured once for each bucket of rows (1, 2, 4, ...); every launch follows row
lists and counts on the device. The host reads one number an exit: how many rows go on, which names the next bucket.

Which row leaves where is given (random weights are certain of nothing); the check is computed all the same. Before
anything is timed, tokens, keys and values are held to those of each row alone without graphs.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from exeunt import ops

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """A decoder, its batch, the tokens in its cache, and after which layers rows may leave."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    inner: int = 14336
    vocab: int = 128_256
    length: int = 512
    batch: int = 16
    exits: tuple[int, ...] = (8, 16, 24)


class Decoder:
    """One step at the last place of a full cache. Rows lie compacted in ``x``; ``rows`` says whose they are."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        s = self.shape = shape
        made = dict(device=device, dtype=dtype)

        def weight(outputs: int, inputs: int) -> torch.Tensor:
            return torch.randn(outputs, inputs, **made) / inputs**0.5

        self.kv = 2 * s.kv_heads * s.head_size
        self.qkv = [weight(s.heads * s.head_size + self.kv, s.width) for _ in range(s.layers)]
        self.out = [weight(s.width, s.heads * s.head_size) for _ in range(s.layers)]
        self.up = [weight(2 * s.inner, s.width) for _ in range(s.layers)]
        self.down = [weight(s.width, s.inner) for _ in range(s.layers)]
        self.norm, self.head = torch.ones(s.width, **made), weight(s.vocab, s.width)
        self.cache = torch.randn(s.layers, 2, s.batch, s.kv_heads, s.length, s.head_size, **made)
        angles = s.length * 1e4 ** -torch.linspace(0, 1, s.head_size // 2, device=device)
        self.cos, self.sin = angles.cos().to(dtype).repeat(2), angles.sin().to(dtype).repeat(2)
        whole = dict(device=device, dtype=torch.int64)
        self.input = torch.randn(s.batch, s.width, **made)
        self.leaves = torch.full((s.batch,), s.layers, **whole)
        self.x, self.rows = torch.zeros(s.batch, s.width, **made), torch.arange(s.batch, **whole)
        self.count, self.before = torch.zeros((), **whole), torch.zeros((), **whole)
        self.tokens = torch.full((s.batch,), -1, **whole)

    def begin(self) -> None:
        self.x.copy_(self.input)
        torch.arange(self.shape.batch, out=self.rows)
        self.count.fill_(self.shape.batch)
        self.tokens.fill_(-1)

    def rotate(self, t: torch.Tensor) -> torch.Tensor:
        a, b = t.chunk(2, -1)
        return t * self.cos + torch.cat((-b, a), -1) * self.sin

    def write(self, layer: int, rows: torch.Tensor, live: torch.Tensor, kv: torch.Tensor) -> None:
        """Keys and values of live rows to the last place; the others keep theirs."""
        k, v = kv.view(len(rows), 2, self.shape.kv_heads, self.shape.head_size).unbind(1)
        for i, new in enumerate((self.rotate(k), v)):
            place = self.cache[layer, i, :, :, -1]
            place.index_copy_(0, rows, torch.where(live[:, None, None], new, place[rows]))

    def layer(self, index: int, x: torch.Tensor, rows: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        s = self.shape
        q, kv = F.linear(self.normed(x), self.qkv[index]).split((s.heads * s.head_size, self.kv), -1)
        self.write(index, rows, live, kv)
        q = self.rotate(q.view(len(x), s.heads, 1, s.head_size))
        keys, values = self.cache[index][:, rows]
        mixed = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + F.linear(mixed.flatten(1), self.out[index])
        gate, up = F.linear(self.normed(x), self.up[index]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down[index])

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[1:], self.norm, EPS)

    def segment(self, first: int, last: int, bucket: int) -> None:
        """Layers first..last-1 of the first ``bucket`` rows, and the check after them."""
        x, rows = self.x[:bucket], self.rows[:bucket].clone()
        live = torch.arange(bucket, device=x.device) < self.count
        for index in range(first, last):
            x = self.layer(index, x, rows, live)
        stats = ops.exit_stats(x, self.head, norm="rms", norm_weight=self.norm, eps=EPS, count=self.count)
        leave = live & (self.leaves[rows] <= last) & (stats.argmax >= 0)
        self.tokens.index_copy_(0, rows, torch.where(leave, stats.argmax, self.tokens[rows]))
        _, count, x, rows = ops.compact(live & ~leave, x, rows)
        self.x[:bucket].copy_(x)
        self.rows[:bucket].copy_(rows)
        self.before.copy_(self.count)
        self.count.copy_(count)

    def fill(self, first: int, bucket: int) -> None:
        """Keys and values of layers first.. of the rows that have just left: they lie behind those that stay."""
        places = torch.arange(bucket, device=self.x.device)
        live = places < self.before - self.count
        # Places past the last row hold whoever comes round: distinct rows, which keep what they have.
        at = (places + self.count) % self.shape.batch
        x, rows = self.normed(self.x[at]), self.rows[at]
        for index in range(first, self.shape.layers):
            self.write(index, rows, live, F.linear(x, self.qkv[index][-self.kv :]))


def buckets(batch: int) -> list[int]:
    return [b for b in (1 << i for i in range(batch.bit_length())) if b < batch] + [batch]


class Graphs:
    """The pieces of a decoder's step, captured for each bucket; ``Eager`` runs them as they are."""

    def __init__(self, decoder: Decoder) -> None:
        self.captured: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.pool = None
        d, s = decoder, decoder.shape
        stops = [*s.exits, s.layers]
        for bucket in buckets(s.batch):
            for first, last in zip([0, *s.exits], stops, strict=True):
                self.capture(d.segment, first, last, bucket)
            for stop in s.exits:
                self.capture(d.fill, stop, bucket)
        self.capture(d.begin)
        self.capture(d.segment, 0, s.layers, s.batch)

    def capture(self, piece, *args) -> None:
        key = (piece.__name__, *args)
        if key in self.captured:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            piece(*args)  # workspaces and plans of libraries
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            piece(*args)
        self.pool = self.pool or graph.pool()
        self.captured[key] = graph

    def __call__(self, piece, *args) -> None:
        self.captured[(piece.__name__, *args)].replay()


def eager(piece, *args) -> None:
    piece(*args)


def step(decoder: Decoder, run=eager) -> list[int]:
    """One token for each row; the rows that went into each segment."""
    s, n, entered = decoder.shape, decoder.shape.batch, []
    sizes = buckets(s.batch)
    run(decoder.begin)
    for first, last in zip([0, *s.exits], [*s.exits, s.layers], strict=True):
        entered.append(n)
        run(decoder.segment, first, last, next(b for b in sizes if b >= n))
        if last == s.layers:
            break
        stay = int(decoder.count)  # the one number that the host waits for
        if stay < n:
            run(decoder.fill, last, next(b for b in sizes if b >= n - stay))
        n = stay
        if n == 0:
            break
    return entered


def full_depth(decoder: Decoder, run=eager) -> None:
    run(decoder.begin)
    run(decoder.segment, 0, decoder.shape.layers, decoder.shape.batch)


def alone(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and keys and values at the last place, of each row by itself: its layers, then its exit state's."""
    d, s, kept = decoder, decoder.shape, decoder.cache.clone()
    tokens = torch.empty_like(d.tokens)
    for i in range(s.batch):
        row, live = d.rows.new_tensor([i]), torch.ones(1, dtype=torch.bool, device=d.x.device)
        x, stop = d.input[i : i + 1], int(d.leaves[i])
        for index in range(stop):
            x = d.layer(index, x, row, live)
        tokens[i] = F.linear(d.normed(x), d.head).argmax()
        for index in range(stop, s.layers):
            d.write(index, row, live, F.linear(d.normed(x), d.qkv[index][-d.kv :]))
    written = d.cache[:, :, :, :, -1].clone()
    d.cache.copy_(kept)
    return tokens, written


def check(decoder: Decoder, run=eager) -> None:
    """Raise unless a step gives what the rows alone give, but for the rounding of products of other sizes."""
    tokens, written = alone(decoder)
    step(decoder, run)
    got = decoder.cache[:, :, :, :, -1]
    tolerance = 1e-4 if got.dtype == torch.float32 else 0.25
    torch.testing.assert_close(got, written, rtol=tolerance, atol=tolerance)
    same = (decoder.tokens == tokens).double().mean().item()
    if (got.dtype == torch.float32 and same < 1) or same < 0.5:
        raise AssertionError(f"expected the tokens {tokens.tolist()}, got {decoder.tokens.tolist()}")


def milliseconds(run, count: int = 30) -> float:
    times = []
    for _ in range(count + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def table():
    yield "## A step with early exits, in CUDA graphs"
    yield ""
    yield "| batch | leave at 8 / 16 / 24 of 32 layers | layer-rows run | full depth ms | exits ms | gain | eager ms |"
    yield "|---" * 7 + "|"
    for batch in (1, 16):
        decoder = Decoder(Shape(batch=batch), "cuda", torch.bfloat16)
        run = Graphs(decoder)
        s = decoder.shape
        for shares in ((0.0, 0.0, 0.0), (0.25, 0.25, 0.25), (0.5, 0.25, 0.125), (1.0, 0.0, 0.0)):
            if batch == 1 and 0 < shares[0] < 1:
                continue
            leaves, at = torch.full((batch,), s.layers), 0
            for stop, share in zip(s.exits, shares, strict=True):
                leaves[at : at + int(share * batch)] = stop
                at += int(share * batch)
            decoder.leaves.copy_(leaves[torch.randperm(batch)])
            check(decoder, run)
            ours, stock, plain = [], [], []
            for _ in range(3):  # in turn
                plain.append(milliseconds(lambda d=decoder: step(d), 5))
                ours.append(milliseconds(lambda d=decoder, run=run: step(d, run), 10))
                stock.append(milliseconds(lambda d=decoder, run=run: full_depth(d, run), 10))
            a, b, c = (statistics.median(times) for times in (ours, stock, plain))
            ran = int(decoder.leaves.sum()) / (batch * s.layers)
            shown = " / ".join(f"{share:.0%}" for share in shares)
            yield f"| {batch} | {shown} | {ran:.0%} | {b:.2f} | {a:.2f} | {b / a:.2f} | {c:.2f} |"
        del decoder, run
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the table is appended to")
    asked = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for line in table():
            print(line, flush=True)
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(line + "\n" if line != "## A step with early exits, in CUDA graphs" else f"\n{line}\n")


if __name__ == "__main__":
    main()
