"""Scripts of what can happen to a generation's cache, put to a model with exits and to an oracle."""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st
from transformers import DynamicCache


def keys_and_values(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


class Run:
    """A model and a cache, put through a script of decoding steps and of things that happen to caches."""

    def __init__(self, model, batch, length, padding, seed, script=()):
        self.model, self.cache, self.outputs = model, DynamicCache(), []
        self.draw = torch.Generator().manual_seed(seed)
        self.mask = torch.ones(batch, 0, dtype=torch.long)
        self.forward(length, padding)
        for happening in script:
            self(*happening)

    @torch.no_grad()
    def forward(self, count, padding=()):
        batch = self.mask.shape[0]
        new = torch.ones(batch, count, dtype=torch.long)
        for row, n in enumerate(padding[:batch]):
            new[row, : min(n, count - 1)] = 0
        self.mask = torch.cat([self.mask, new], 1)
        ids = torch.randint(3, 203, (batch, count), generator=self.draw)
        out = self.model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions(self.mask)[:, -count:],
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip
        self.outputs.append(out.logits[:, -1])

    def __call__(self, what, *args):
        batch, length = self.mask.shape
        if what == "steps":
            for _ in range(args[0]):
                self.forward(1)
        elif what == "chunk":
            self.forward(args[0])
        elif what == "crop" and length - args[0] > 4:
            self.cache.crop(-args[0])
            self.mask = self.mask[:, : length - args[0]]
        elif what == "reorder":
            rows = torch.tensor([r % batch for r in (args[0] * batch)[:batch]])
            self.cache.reorder_cache(rows)
            self.mask = self.mask[rows]
        elif what == "select":
            rows = torch.tensor(sorted({r % batch for r in args[0]}))
            self.cache.batch_select_indices(rows)
            self.mask = self.mask[rows]
        elif what == "repeat" and batch <= 4:
            self.cache.batch_repeat_interleave(2)
            self.mask = self.mask.repeat_interleave(2, dim=0)
        elif what == "copy":
            self.cache = copy.deepcopy(self.cache)
        elif what == "read":
            self.outputs.append(torch.cat([t.flatten() for pair in keys_and_values(self.cache) for t in pair]))


def assert_same(early, ours, oracle, theirs):
    """Depths and outputs of a run with exits are those of the run under the oracle."""
    for got, want in zip(early.report().exit_layers, oracle.depths, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(ours.outputs, theirs.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


rows = st.lists(st.integers(0, 7), min_size=1, max_size=8)
steps = st.tuples(st.just("steps"), st.integers(1, 5))
happenings = st.one_of(
    steps,
    steps,
    st.tuples(st.just("chunk"), st.integers(2, 4)),
    st.tuples(st.just("crop"), st.integers(1, 4)),
    st.tuples(st.just("reorder"), rows),
    st.tuples(st.just("select"), rows),
    st.sampled_from([("repeat",), ("copy",), ("read",)]),
)
