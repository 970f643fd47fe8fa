"""What exits on a tagger did: token-rows executed, where words halted, time."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from exeunt.report import count_depths, depth_lines

__all__ = ["TokenReport"]


@dataclass
class TokenReport:
    """Counts of every forward between attach (or ``reset_report``) and now.

    A *token-row* is one layer run for one token: attention and feed-forward, with all that belongs to them.

    Attributes
    ----------
    layers : int
        Depth L of the encoder.
    forwards : int
        Calls of the model.
    rows, words, tokens : int
        Texts, words and tokens (without padding) over all of them.
    layer_tokens : int
        Token-rows executed; until the first word of a batch halts, padding among them, as in the stock model.
    key_tokens : int
        Token-rows of which keys and values alone were computed, from a frozen state.
    checks : int
        Words that an exit judged, those among them that had halted.
    exit_layers : list of Tensor
        One int64 CPU tensor a forward: the layer after which each word halted; L-1 at full depth.
    seconds : float
        Wall time inside the encoder (CUDA work may still be in flight).

    Examples
    --------
    >>> import torch
    >>> report = TokenReport(layers=4, forwards=1, rows=1, words=2, tokens=4, layer_tokens=10,
    ...                      exit_layers=[torch.tensor([1, 3])])
    >>> report.histogram, report.layers_per_token
    ({1: 1, 3: 1}, 2.5)
    """

    layers: int
    forwards: int = 0
    rows: int = 0
    words: int = 0
    tokens: int = 0
    layer_tokens: int = 0
    key_tokens: int = 0
    checks: int = 0
    exit_layers: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def full_layer_tokens(self) -> int:
        """Token-rows at full depth without padding."""
        return self.tokens * self.layers

    @property
    def histogram(self) -> dict[int, int]:
        """Words by the layer after which they halted (L-1: full depth), ascending."""
        return count_depths(self.exit_layers)

    @property
    def layers_per_token(self) -> float:
        """Mean number of layers run for a token, padding included; nan without tokens."""
        return self.layer_tokens / self.tokens if self.tokens else float("nan")

    def __str__(self) -> str:
        """Return the report as a small table."""
        share = self.layer_tokens / self.full_layer_tokens if self.tokens else 0.0
        lines = [
            f"exeunt: {self.words} words of {self.rows} rows in {self.forwards} forwards, {self.layers} layers",
            f"  token-rows   {self.layer_tokens} run of {self.full_layer_tokens} at full depth ({share:.1%}), "
            f"keys and values alone in {self.key_tokens}",
        ]
        lines += depth_lines(self.histogram, self.layers, "halted")
        lines.append(f"  wall time    {self.seconds:.3f} s in the encoder, {self.checks} words judged at exits")
        return "\n".join(lines)
