"""The exit points of an attached model: what is read and decided there, and the logits of rows that left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exeunt import ops
from exeunt.candidates import Candidates, among
from exeunt.confidence import ExitPoint
from exeunt.models import Structure
from exeunt.policies import Adaptive, At, Evidence, keep
from exeunt.recipes import Recipe
from exeunt.stats import ExitStats
from exeunt.step import Step

if TYPE_CHECKING:
    from exeunt.heads import ExitHead

__all__ = ["ExitPoints"]


class ExitPoints:
    """A recipe's exits on one model: the check after a layer, and the logits at the end of a decoding step.

    An exited row reads the head once: a check that reads it keeps the logits in the step's buffer, and
    :meth:`logits` hands them out instead of asking the stock head again.

    Parameters
    ----------
    structure : Structure
        The model's parts.
    recipe : Recipe
        What decides.

    Raises
    ------
    ValueError
        For exits outside 0..L-2, and for exit heads that do not fit the model in width, dtype or device.

    Examples
    --------
    >>> import exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.exit_points import ExitPoints
    >>> from exeunt.models import discover
    >>> structure = discover(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)))
    >>> list(ExitPoints(structure, exeunt.recipes.calm([1, 2])).heads)
    [1, 2]
    >>> ExitPoints(structure, exeunt.recipes.calm([3]))
    Traceback (most recent call last):
        ...
    ValueError: attach: exits must lie in 0..2 for 4 layers, got [3]
    """

    def __init__(self, structure: Structure, recipe: Recipe) -> None:
        self.structure, self.recipe = structure, recipe
        self.heads = {e: recipe.head(e) for e in recipe.exits or ()}
        self._index = {e: k for k, e in enumerate(self.heads)}
        self._readable = structure.form is not None and structure.weight.dtype in ops.DTYPES
        self._spare: Tensor | None = None  # a logits buffer that no caller holds
        self._validate()

    def _validate(self) -> None:
        last = len(self.structure.layers) - 2
        outside = [e for e in self.heads if not 0 <= e <= last]
        if outside:
            raise ValueError(f"attach: exits must lie in 0..{last} for {last + 2} layers, got {outside}")
        s, policy, measures = self.structure, self.recipe.policy, self.recipe.measures
        weight = s.weight
        if policy.answers or policy.needs & {"logits", "truth"}:
            name = type(policy).__name__
            raise ValueError(f"attach: expected a policy whose tokens take their exit's own logits, got {name}")
        reads_head = self.recipe.reads_head or self.recipe.candidates is not None
        if reads_head and weight.dtype not in ops.DTYPES:
            kinds = " or ".join(str(t) for t in ops.DTYPES)
            raise ValueError(f"attach: {measures} reads the head, which must be {kinds}, got {weight.dtype}")
        if reads_head and s.form is None:
            raise ValueError(
                f"attach: {measures} reads the head, which must be a product with a [V, D] weight in memory, "
                f"scaled or capped in a known way, got {type(s.head).__name__} of {type(s.model).__name__}; "
                "saturation and probe read no head"
            )
        for e, own in self.heads.items():
            if own.layer is not None:
                raise ValueError(
                    "attach: expected exit heads that read one token's state, got a decoder layer of its own at exit "
                    f"{e}, for which no keys and values are kept"
                )
            for part in (own.translator, own.probe):
                if part is None:
                    continue
                if part.hidden_size != weight.shape[1]:
                    raise ValueError(
                        f"attach: expected exit heads of width {weight.shape[1]}, got {part.hidden_size} at exit {e}"
                    )
                dtype = weight.dtype if part is own.translator else torch.float32  # probes stay float32
                if (part.weight.dtype, part.weight.device) != (dtype, weight.device):
                    raise ValueError(
                        f"attach: exit heads must be {dtype} on {weight.device} like the model, "
                        f"got {part.weight.dtype} on {part.weight.device}: call heads.to(...)"
                    )

    # ---- after a layer

    @torch.no_grad()
    def check(self, i: int, step: Step, before: Tensor, after: Tensor) -> None:
        """Score the running rows after layer i and let those go that the policy releases.

        ``before`` and ``after`` are the layer's [B, 1, D] input and output.
        """
        own, recipe = self.heads[i], self.recipe
        at = At(self._index[i], i, len(self._index), step.position)
        if not recipe.policy.looks(at):
            return
        hidden, previous = after[:, 0], before[:, 0]
        classes, stats, local = self.structure.weight.shape[0], None, None
        if recipe.reads_head:
            stats = self._read_head(self._exit_state(own, hidden, step), step.rows, step)
            step.report.checks += 1
        if step.rows is not None:
            hidden, previous = hidden[step.rows], previous[step.rows]
        if step.policy is None:
            step.policy = recipe.start(len(hidden), hidden.device, classes)
        if recipe.candidates is not None:
            local, stats = self._candidates(recipe.candidates, self._exit_state(own, after[:, 0], step), hidden, step)
        leave, seen = recipe.look(step.policy, ExitPoint(hidden, previous, own, stats, classes, local=local), at)
        if local is not None:
            leave = self._confirmed(leave, stats, self._exit_state(own, after[:, 0], step), step)
        if isinstance(recipe.policy, Adaptive) and recipe.policy.learns:
            step.lesson = self._everywhere(seen, step)
        if step.leave(leave, i):
            step.policy = keep(step.policy, ~leave)
            step.state.exited = True

    @staticmethod
    def _everywhere(seen: Evidence, step: Step) -> tuple[Tensor, Tensor]:
        """[B] scores and labels of the running rows; NaN and -1 elsewhere."""
        assert seen.score is not None and seen.label is not None
        rows = step.running_rows
        scores = seen.score.new_full((step.batch,), float("nan")).index_copy(0, rows, seen.score)
        return scores, seen.label.new_full((step.batch,), -1).index_copy(0, rows, seen.label)

    def _candidates(
        self, wanted: Candidates, state: Tensor, hidden: Tensor, step: Step
    ) -> tuple[Tensor, ExitStats | None]:
        """Logits [n, k] of the running rows' candidates, named at their first check; statistics if that read the head.

        ``state`` [B, D] goes into the last norm; ``hidden`` [n, D] are the layer's states of rows that run.
        """
        assert step.policy is not None
        if "candidates" not in step.policy:
            if wanted.draft is None:
                stats = self._read_head(state, step.rows, step, topk=wanted.count)
                assert stats.topk_ids is not None and stats.topk_logits is not None
                step.policy["candidates"] = stats.topk_ids.clamp_min(0)
                return stats.topk_logits, stats
            step.policy["candidates"] = wanted.drafted(hidden, self.structure.weight.shape[0])
        rows = state if step.rows is None else state[step.rows]
        return self.structure.candidate_logits(rows, step.policy["candidates"]), None

    def _confirmed(self, leave: Tensor, stats: ExitStats | None, state: Tensor, step: Step) -> Tensor:
        """Those of the rows that would leave for which the whole head says one of their candidates."""
        if not bool(leave.any()):
            return leave
        step.report.checks += 1
        assert step.policy is not None
        go = leave.nonzero()[:, 0]
        if stats is None:
            label = self._read_head(state, step.running_rows[go], step).argmax
        else:
            label = stats.argmax[go]
        return leave.index_copy(0, go, among(label, step.policy["candidates"][go]))

    def _exit_state(self, own: ExitHead, hidden: Tensor, step: Step) -> Tensor:
        """[B, D] states that go into the last norm; of the running rows only they matter."""
        if own.translator is None or step.rows is None:
            return own.state(hidden)
        return hidden.index_copy(0, step.rows, own.state(hidden[step.rows]))

    def _read_head(self, state: Tensor, rows: Tensor | None, step: Step, topk: int = 0) -> ExitStats:
        """Statistics of the logits of some rows; the logits themselves go to the step's buffer."""
        if step.logits is None:
            shape, dtype = self.structure.logits_buffer(state, step.batch)
            spare, self._spare = self._spare, None
            fits = (
                spare is not None
                and (spare.shape, spare.dtype, spare.device) == (shape, dtype, state.device)
                and spare.is_inference() == torch.is_inference_mode_enabled()
            )
            step.logits = spare if fits else state.new_empty(shape, dtype=dtype)
        step.report.head_reads += 1
        return self.structure.exit_stats(state, rows=rows, topk=topk, logits_out=step.logits)

    # ---- what a policy learns from

    def learn(self, step: Step, logits: Tensor) -> None:
        """Tell the policy of rows that were looked at and then ran at full depth; the head gave [B, 1, V] logits."""
        policy, rows, bias = self.recipe.policy, step.running_rows, self.structure.bias
        if isinstance(policy, Adaptive) and step.lesson is not None and step.running:
            scores, labels = (t[rows] for t in step.lesson)
            own = logits[rows, 0] if bias is None else logits[rows, 0] + bias
            policy.learn(scores, own.argmax(-1) == labels)

    def deepened(self, scores: Tensor, labels: Tensor, hidden: Tensor) -> None:
        """The same of m tokens of earlier steps, by the last layer's output [m, 1, D]."""
        policy = self.recipe.policy
        assert isinstance(policy, Adaptive)
        policy.learn(scores, self.structure.exit_stats(hidden[:, 0]).argmax == labels)

    # ---- at the end of the step

    def logits(self, stock: Callable[..., Any], normed: Tensor, step: Step) -> Tensor:
        """Logits [B, 1, V]: of the check for rows that left at one, of the stock head for the others.

        Parameters
        ----------
        stock : callable
            The output embedding's own forward.
        normed : Tensor
            [B, 1, D] states that the model hands to it.
        step : Step
            The step that ends.
        """
        if step.running == step.batch:
            self._spare = step.logits  # nobody left: the buffer was not handed out
            step.report.head_reads += 1
            return stock(normed)
        if step.left is not None and step.logits is None:
            if self._readable and not step.running:  # no row needs the stock head
                self._read_head(self._left_states(step), step.left, step)
            else:
                normed = self._translate(normed, step)
        if step.logits is None:
            out = normed.new_empty(step.batch, self.structure.weight.shape[0])
        else:
            out = self.structure.raw(step.logits, normed.dtype)
        if step.ended is not None:
            out[step.ended] = 0.0
        asking = [r for r in (step.rows, None if step.logits is not None else step.left) if r is not None and r.numel()]
        if asking:
            rows = torch.cat(asking)
            own = stock(normed[rows])[:, 0]
            out = out.to(own.dtype)  # under autocast the head's is not that of the states
            out[rows] = own
            step.report.head_reads += 1
        return out[:, None]

    def _translated(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows that left at an exit with a translator, and their [n, D] states behind it."""
        assert step.left is not None and step.hidden is not None
        for layer, own in self.heads.items():
            rows = step.left[step.depth[step.left] == layer]
            if own.translator is not None and rows.numel():
                yield rows, own.state(step.hidden[rows, 0])

    def _left_states(self, step: Step) -> Tensor:
        """[B, D] states that go into the last norm for rows that left without reading the head."""
        assert step.hidden is not None
        states = step.hidden[:, 0]
        for rows, state in self._translated(step):
            states = states.index_copy(0, rows, state)
        return states

    def _translate(self, normed: Tensor, step: Step) -> Tensor:
        """The same behind the last norm, [B, 1, D], where ``normed`` are the states that the model handed over."""
        for rows, state in self._translated(step):
            normed = normed.index_copy(0, rows, self.structure.head_input(state)[:, None])
        return normed
