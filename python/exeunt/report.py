"""What attached exits did: layer-rows executed, exits taken, reads of the head, time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Report"]

FINISHED = -1


def count_depths(exit_layers: list[Tensor]) -> dict[int, int]:
    """How often each layer stands in [B] tensors of them, ascending."""
    return dict(sorted(Counter(torch.cat(exit_layers).tolist()).items())) if exit_layers else {}


def depth_lines(histogram: dict[int, int], layers: int, verb: str) -> list[str]:
    """A line for each exit of a histogram: how many ``verb`` there, and which part of all that is.

    Examples
    --------
    >>> print(*depth_lines({3: 1, 11: 3}, 12, "left"), sep="\\n")
      left after 4 of 12 layers (exit 3)            1   25.0%
      full depth                                    3   75.0%
    """
    names = {FINISHED: "row had ended", layers - 1: "full depth"}
    total = sum(histogram.values())
    return [
        f"  {names.get(exit, f'{verb} after {exit + 1} of {layers} layers (exit {exit})'):<40} {count:6d}  "
        f"{count / total:6.1%}"
        for exit, count in histogram.items()
    ]


@dataclass
class Report:
    """Counts of everything that ran between attach (or ``reset_report``) and now.

    Rows are sequences (or beams) of a batch; a *layer-row* is one layer run for one row. Only single-token decoding
    steps are counted in detail: prompts, chunks and assisted decoding run at full depth and count as ``full_forwards``.

    Attributes
    ----------
    layers : int
        Depth L of the model.
    steps : int
        Decoding steps.
    tokens : int
        Rows over all steps: tokens that the stock model would have run through all layers.
    layer_rows : int
        Layer-rows executed.
    late_rows : int
        How many of them ran for tokens that had left early, beside a later one (:class:`exeunt.states.Defer`).
    fill_ins : int
        Layer-rows for which only keys and values were computed.
    captures : int
        How many of them the stock layer computed itself, since ``kv_fill`` does not serve this model.
    head_reads : int
        Passes over the output embedding's weight: checks plus final logits; the stock model makes one a step.
    checks : int
        How many of them were exit checks.
    attention : Counter of str
        Calls of attention by what served them, where the model's attention is exeunt's
        (:func:`exeunt.register_attention`): ``ragged_attention``, or ``torch: `` and why.
    graphs : Counter of str
        Segments of decoding steps by what became of them where the device has graphs (CUDA): recorded, replayed, run
        before they are recorded; and steps that ran without, with the reason.
    exit_layers : list of Tensor
        One [B] int64 tensor a step, where the model is: the layer after which each row left; L-1 at full depth, -1 for
        a row that had already ended and ran nothing.
    step_seconds, forward_seconds : float
        Wall time inside the model, of decoding steps and of full forwards (CUDA work may still be in flight).
    full_forwards : int
        Forwards at full depth that are not decoding steps.

    Examples
    --------
    >>> import torch
    >>> report = Report(layers=4, steps=1, tokens=2, layer_rows=6, exit_layers=[torch.tensor([1, 3])])
    >>> report.histogram, report.layers_per_token
    ({1: 1, 3: 1}, 3.0)
    """

    layers: int
    steps: int = 0
    tokens: int = 0
    layer_rows: int = 0
    late_rows: int = 0
    fill_ins: int = 0
    captures: int = 0
    head_reads: int = 0
    checks: int = 0
    attention: Counter[str] = field(default_factory=Counter)
    graphs: Counter[str] = field(default_factory=Counter)
    exit_layers: list[Tensor] = field(default_factory=list)
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    full_forwards: int = 0

    @property
    def full_layer_rows(self) -> int:
        """Layer-rows that the stock model would have executed in the same steps."""
        return self.tokens * self.layers

    @property
    def histogram(self) -> dict[int, int]:
        """Tokens by the layer after which they left (L-1: full depth, -1: row had ended), ascending."""
        return count_depths(self.exit_layers)

    @property
    def layers_per_token(self) -> float:
        """Mean number of layers run for a token of a row that had not ended; nan without tokens."""
        live = self.tokens - self.histogram.get(FINISHED, 0)
        return self.layer_rows / live if live else float("nan")

    def __str__(self) -> str:
        """Return the report as a small table."""
        lines = [f"exeunt: {self.tokens} tokens in {self.steps} decoding steps, {self.layers} layers"]
        share = self.layer_rows / self.full_layer_rows if self.full_layer_rows else 0.0
        lines.append(
            f"  layer-rows   {self.layer_rows} run of {self.full_layer_rows} at full depth ({share:.1%}), "
            f"{self.fill_ins} filled in"
            + (f" ({self.captures} by the stock layers)" if self.captures else "")
            + (f", {self.late_rows} run late" if self.late_rows else "")
        )
        lines += depth_lines(self.histogram, self.layers, "left")
        lines.append(
            f"  head reads   {self.head_reads} ({self.checks} of them exit checks; the stock model: {self.steps})"
        )
        for what, count in sorted(self.attention.items()):
            lines.append(f"  attention    {count} calls by {what}")
        lines += [f"  graphs       {count} {what}" for what, count in sorted(self.graphs.items())]
        lines.append(
            f"  wall time    {self.step_seconds:.3f} s in decoding steps, {self.forward_seconds:.3f} s in "
            f"{self.full_forwards} forwards at full depth (prompts and the like)"
        )
        return "\n".join(lines)
