"""Fitting SpecEE's predictors: one hidden layer on the logits of a few candidates."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exeunt.candidates import among, features, over_exits
from exeunt.heads import CandidateProbe, ExitHead, ExitHeads
from exeunt.models import discover
from exeunt.training.loop import adamw, fit
from exeunt.training.recording import tracked

__all__ = ["train_candidate_probes"]


class _Probes(nn.Module):
    """The probes of all exits; takes (features [n, E, 3k], right [n, E]) and returns the loss, classes balanced."""

    def __init__(self, exits: int, count: int, width: int) -> None:
        super().__init__()
        self.probes = nn.ModuleList(CandidateProbe(count, width) for _ in range(exits))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen, right = batch
        losses = []
        for k, probe in enumerate(self.probes):
            yes, odds = right[:, k], probe.logit(seen[:, k])  # type: ignore[operator]
            share = yes.mean().clamp(1e-3, 1 - 1e-3)
            weight = torch.where(yes > 0.5, 0.5 / share, 0.5 / (1 - share))
            losses.append(F.binary_cross_entropy_with_logits(odds, yes, weight))
        return torch.stack(losses).sum()


@torch.no_grad()
def examples(
    model: Any, rows: Tensor, exits: list[int], heads: ExitHeads | None, count: int, batch: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """What probes read at every exit, [n, E, 3 count], and whether they should say yes, [n, E]."""
    structure = discover(model)
    owns = [heads[e] if heads is not None and e in heads else ExitHead() for e in exits]
    seen, right = [], []
    for start in tracked(list(range(0, len(rows), batch)), "Recording", progress):
        ids = rows[start : start + batch].to(structure.weight.device)
        out = model.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=True)
        states = [own.state(out.hidden_states[e + 1]).flatten(0, 1) for e, own in zip(exits, owns, strict=True)]
        named, logits, predicted = over_exits(structure, states, count)
        before = torch.full_like(logits[:, :1], torch.nan)
        shown = torch.cat((before, logits.softmax(-1)[:, :-1]), 1)
        seen.append(features(logits.flatten(0, 1), shown.flatten(0, 1)).view(len(named), len(exits), -1).cpu())
        full = structure.head(out.last_hidden_state.flatten(0, 1)).argmax(-1)
        agree = torch.stack([(p == full) & among(p, named) for p in predicted.unbind(1)], 1)
        right.append(agree.float().cpu())
    return torch.cat(seen), torch.cat(right)


def train_candidate_probes(
    model: Any,
    rows: Tensor,
    exits: Iterable[int],
    checkpoint: str | os.PathLike[str],
    *,
    heads: ExitHeads | None = None,
    count: int = 4,
    width: int = 512,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> ExitHeads:
    """Fit a :class:`exeunt.heads.CandidateProbe` for every exit: whether it says what full depth will.

    The candidates are those that :func:`exeunt.recipes.specee` takes without a draft. The model runs over the text
    once; stopped, the same call goes on from ``checkpoint``.

    Parameters
    ----------
    model : transformers model for causal language modelling
        Nothing may be attached to it.
    rows : Tensor
        [R, S] token ids of a text.
    exits : iterable of int
        0-based layers.
    checkpoint : path
        File for the state of the fitting.
    heads : ExitHeads, optional
        Translators that the exits have already; they are kept.
    count : int, default 4
        Candidates.
    width : int, default 512
        Of the hidden layer.
    steps, batch, learning_rate, seed, progress
        Of :func:`exeunt.training.fit`.

    Returns
    -------
    ExitHeads

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.training import train_candidate_probes
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     heads = train_candidate_probes(model, torch.randint(64, (4, 16)), [1, 2], f"{folder}/run", steps=3,
    ...                                    width=8, progress=False)
    >>> list(heads), heads[1].candidates.count
    ([1, 2], 4)
    """
    chosen = sorted(exits)
    seen, right = examples(model, rows, chosen, heads, count, 8, progress)
    torch.manual_seed(seed)
    probes = _Probes(len(chosen), count, width)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(seen), (batch,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        return seen[index], right[index]

    identity = {"exits": chosen, "count": count, "width": width, "tokens": len(seen), "sum": float(seen.sum())}
    fit(probes, batches, checkpoint, steps=steps, optimizers=adamw(probes, learning_rate), identity=identity, seed=seed,
        progress=progress, title="Probes of candidates")  # fmt: skip
    made = {}
    for e, probe in zip(chosen, probes.probes, strict=True):
        own = heads[e] if heads is not None and e in heads else ExitHead()
        made[e] = ExitHead(own.translator, own.probe, own.layer, probe.requires_grad_(False).cpu())  # type: ignore[arg-type]
    return ExitHeads(made)
