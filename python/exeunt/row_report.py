"""What exits on an encoder did: layer-rows executed, exits taken, time."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from exeunt.report import count_depths, depth_lines

__all__ = ["RowReport"]


@dataclass
class RowReport:
    """Counts of every forward between attach (or ``reset_report``) and now.

    A *layer-row* is one layer run for one row (text) of a batch.

    Attributes
    ----------
    layers : int
        Depth L of the encoder.
    forwards : int
        Calls of the model.
    rows : int
        Rows over all of them.
    layer_rows : int
        Layer-rows executed.
    layer_tokens : int
        Tokens, padding included, over all layers executed: what length buckets make smaller.
    checks : int
        Rows that an exit judged.
    exit_layers : list of Tensor
        One [B] int64 CPU tensor a forward: the layer after which each row left; L-1 at full depth.
    seconds : float
        Wall time inside the encoder (CUDA work may still be in flight).

    Examples
    --------
    >>> import torch
    >>> report = RowReport(layers=4, forwards=1, rows=2, layer_rows=6, exit_layers=[torch.tensor([1, 3])])
    >>> report.histogram, report.layers_per_row
    ({1: 1, 3: 1}, 3.0)
    """

    layers: int
    forwards: int = 0
    rows: int = 0
    layer_rows: int = 0
    layer_tokens: int = 0
    checks: int = 0
    exit_layers: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def full_layer_rows(self) -> int:
        """Layer-rows that the stock model would have executed."""
        return self.rows * self.layers

    @property
    def histogram(self) -> dict[int, int]:
        """Rows by the layer after which they left (L-1: full depth), ascending."""
        return count_depths(self.exit_layers)

    @property
    def layers_per_row(self) -> float:
        """Mean number of layers run for a row; nan without rows."""
        return self.layer_rows / self.rows if self.rows else float("nan")

    def __str__(self) -> str:
        """Return the report as a small table."""
        share = self.layer_rows / self.full_layer_rows if self.rows else 0.0
        lines = [
            f"exeunt: {self.rows} rows in {self.forwards} forwards, {self.layers} layers",
            f"  layer-rows   {self.layer_rows} run of {self.full_layer_rows} at full depth ({share:.1%})",
        ]
        lines += depth_lines(self.histogram, self.layers, "left")
        lines.append(f"  wall time    {self.seconds:.3f} s in the encoder, {self.checks} rows judged at exits")
        return "\n".join(lines)
