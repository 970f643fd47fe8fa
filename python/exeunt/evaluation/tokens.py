"""Recording a language model on text, token by token, and holding an estimate to a live generation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from exeunt import ops
from exeunt.attach import attach
from exeunt.calibration import fingerprints
from exeunt.candidates import among, features, over_exits
from exeunt.confidence import ExitPoint, measure
from exeunt.heads import ExitHead, ExitHeads
from exeunt.models import Structure, discover
from exeunt.replay import STATISTICS, Recording, Replay
from exeunt.stats import ExitStats
from exeunt.training.modules import check_exits
from exeunt.training.recording import tracked

__all__ = ["live_check", "record_tokens"]


@torch.no_grad()
def record_tokens(
    model: Any,
    rows: Tensor,
    exits: Iterable[int],
    *,
    heads: ExitHeads | None = None,
    prompt: int = 1,
    batch: int = 8,
    progress: bool = True,
) -> Recording:
    """What every exit says of the tokens of a text, at full depth behind: teacher-forced, no logits are kept.

    Parameters
    ----------
    model : transformers model for causal language modelling
        Nothing may be attached to it.
    rows : Tensor
        [R, S] token ids.
    exits : iterable of int
        0-based layers.
    heads : ExitHeads, optional
        Trained exit heads.
    prompt : int, default 1
        Tokens of a row that count as its prompt. The first new token comes from the prompt's own forward, at full
        depth; those behind it are recorded.
    batch : int, default 8
        Rows that run together.
    progress : bool, default True

    Returns
    -------
    Recording
        Of R (S - prompt - 1) tokens, with ``saturation`` and, where all exits have one, ``probe``; labels are the words
        of the text. Where all exits have probes of candidates, ``candidate_probe`` with those that the first exit
        names: NaN where the whole head would not confirm them, so that a replay lets no such token go.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.evaluation import record_tokens
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> recording = record_tokens(model, torch.randint(64, (2, 10)), [1, 2], prompt=4, progress=False)
    >>> len(recording), recording.exits, recording.limit
    (10, (1, 2), 6)
    """
    structure = discover(model)
    chosen = check_exits(exits, len(structure.layers))
    count = rows.shape[1] - prompt - 1
    if prompt < 1 or count < 1:
        raise ValueError(f"prompt must leave tokens to predict in rows of {rows.shape[1]}, got {prompt}")
    owns = {e: heads[e] if heads is not None and e in heads else ExitHead() for e in chosen}
    plain = ["saturation", *(["probe"] if all(own.probe is not None for own in owns.values()) else [])]
    counts = {None if own.candidates is None else own.candidates.count for own in owns.values()}
    named = len(counts) == 1 and None not in counts
    names = [*plain, *(["candidate_probe"] if named else [])]
    parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    starts = list(range(0, len(rows), batch))
    for start in tracked(starts, "Recording", progress):
        ids = rows[start : start + batch].to(structure.weight.device)
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        hooks = [structure.layers[e].register_forward_hook(_keeper(seen, e)) for e in chosen]
        try:
            last = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        cut = lambda h: h[:, prompt:-1].flatten(0, 1)  # noqa: E731
        found, scores = [], {name: [] for name in names}  # type: ignore[var-annotated]
        if named:
            into_norm = [cut(own.state(seen[e][1])) for e, own in owns.items()]
            scores["candidate_probe"] = _candidate_scores(structure, owns, into_norm)
        for e, own in owns.items():
            before, after = (cut(h) for h in seen[e])
            found.append(_statistics(structure, cut(own.state(seen[e][1])), normalised=False))
            for name in plain:
                scores[name].append(measure(name).score(ExitPoint(after, before, own, found[-1])).float().cpu())
        found.append(_statistics(structure, cut(last), normalised=True))
        nothing = torch.full((len(found[0].argmax),), torch.nan)
        parts.append((
            torch.stack([torch.stack([getattr(s, n) for n in STATISTICS], -1) for s in found], 1).float().cpu(),
            torch.stack([s.argmax for s in found], 1).cpu(),
            {name: torch.stack([*values, nothing], 1) for name, values in scores.items()},
        ))  # fmt: skip
    statistics, predicted, measures = zip(*parts, strict=True)
    return Recording(
        exits=chosen,
        layers=len(structure.layers),
        classes=structure.weight.shape[0],
        statistics=torch.cat(statistics),
        predicted=torch.cat(predicted),
        measures={name: torch.cat([m[name] for m in measures]) for name in names},
        labels=rows[:, prompt + 1 :].flatten().cpu().long(),
        positions=torch.arange(1, count + 1).repeat(len(rows)),
        limit=count + 1,
        about={"model": fingerprints.of_model(model), "data": list(fingerprints.of_data(rows.tolist()))},
    )


def _candidate_scores(structure: Structure, owns: dict[int, ExitHead], states: list[Tensor]) -> list[Tensor]:
    """Scores [n] of every exit's probe of candidates, NaN where the whole head says none of them."""
    probes = [own.candidates for own in owns.values() if own.candidates is not None]
    ids, logits, predicted = over_exits(structure, [s.contiguous() for s in states], probes[0].count)
    shown, scores = torch.full_like(logits[:, 0], torch.nan), []
    for k, probe in enumerate(probes):
        score = probe(features(logits[:, k], shown))
        shown = logits[:, k].softmax(-1)
        scores.append(torch.where(among(predicted[:, k], ids), score, torch.nan).cpu())
    return scores


def _keeper(seen: dict[int, tuple[Tensor, Tensor]], e: int) -> Any:
    def keep(module: Any, args: Any, out: Any) -> None:
        seen[e] = args[0], out[0] if isinstance(out, tuple) else out

    return keep


def _statistics(structure: Structure, state: Tensor, normalised: bool) -> ExitStats:
    """Statistics of the head's logits, as an exit check takes them."""
    norm = None if normalised else structure.final_norm
    if not normalised and norm is None:
        state = structure.normalise(state)
    return ops.exit_stats(
        state.contiguous(),
        structure.weight,
        head_bias=getattr(structure.head, "bias", None),
        norm=norm.kind if norm else None,
        norm_weight=norm.weight if norm else None,
        norm_bias=norm.bias if norm else None,
        eps=norm.eps if norm else 0.0,
    )


@torch.no_grad()
def live_check(model: Any, replayed: Replay, prompts: Tensor, *, tokens: int = 32) -> str:
    """Generate a sample with the recipe attached, and say how far the replay is from it.

    Parameters
    ----------
    model : transformers model for causal language modelling
        The one that was recorded.
    replayed : Replay
        An estimate.
    prompts : Tensor
        [B, S] token ids.
    tokens : int, default 32
        New tokens of each.

    Returns
    -------
    str
        One sentence.

    Raises
    ------
    ValueError
        If the recording is of another model.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.evaluation import live_check, record_tokens
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, eos_token_id=None,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> recording = record_tokens(model, torch.randint(64, (2, 10)), [1], progress=False)
    >>> told = exeunt.replay.replay(recording, exeunt.recipes.calm([1], 0.0))
    >>> live_check(model, told, torch.tensor([[3, 5, 7]]), tokens=3)
    'Live, 2 generated tokens: 2.00 layers, 100.0% left early; the replay says 2.00 layers, 100.0%.'
    """
    recorded = replayed.recording.about.get("model")
    if recorded is not None and recorded != fingerprints.of_model(model):
        raise ValueError("live_check: expected the model that was recorded, got another")
    with attach(model, replayed.recipe) as early:
        model.generate(prompts, max_new_tokens=tokens, do_sample=False)
    depth = torch.cat(early.report().exit_layers).double()
    depth = depth[depth >= 0]  # rows that had ended take no layer
    left = float((depth < replayed.recording.layers - 1).double().mean())
    told = float((replayed.depth < replayed.recording.layers - 1).double().mean())
    return (
        f"Live, {len(depth)} generated tokens: {float(depth.mean()) + 1:.2f} layers, {left:.1%} left early; the replay "
        f"says {replayed.mean_layers:.2f} layers, {told:.1%}."
    )
