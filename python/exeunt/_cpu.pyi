"""
CPU kernels of exeunt: plain pointers and integers, validated by exeunt.ops.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['amx_refused', 'exit_stats', 'exit_stats_workspace', 'isa', 'kv_fill', 'kv_fill_workspace', 'saturation', 'select_isa', 'small_head', 'version']
def amx_refused() -> bool:
    """
    Whether the CPU has AMX and the operating system refused it.
    """
def exit_stats(hidden: typing.SupportsInt | typing.SupportsIndex, hidden_dtype: typing.SupportsInt | typing.SupportsIndex, hidden_stride: typing.SupportsInt | typing.SupportsIndex, hidden_rows: typing.SupportsInt | typing.SupportsIndex, head: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], head_rows: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, vocab: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, row_list: typing.SupportsInt | typing.SupportsIndex, row_list_64: bool, count: typing.SupportsInt | typing.SupportsIndex, count_64: bool, head_bias: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], norm: typing.SupportsInt | typing.SupportsIndex, norm_weight: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], norm_bias: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], eps: typing.SupportsFloat | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, temperature: typing.SupportsFloat | typing.SupportsIndex, logits_out: typing.SupportsInt | typing.SupportsIndex, logits_dtype: typing.SupportsInt | typing.SupportsIndex, logits_stride: typing.SupportsInt | typing.SupportsIndex, entropy: bool, columns: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, target_out: typing.SupportsInt | typing.SupportsIndex, topk: typing.SupportsInt | typing.SupportsIndex, topk_logits: typing.SupportsInt | typing.SupportsIndex, topk_ids: typing.SupportsInt | typing.SupportsIndex, seeds: typing.SupportsInt | typing.SupportsIndex, sample: typing.SupportsInt | typing.SupportsIndex, argmax: typing.SupportsInt | typing.SupportsIndex, top1: typing.SupportsInt | typing.SupportsIndex, top2: typing.SupportsInt | typing.SupportsIndex, sumexp: typing.SupportsInt | typing.SupportsIndex, weighted: typing.SupportsInt | typing.SupportsIndex, workspace: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fused norm, head and online softmax; see exeunt.ops.exit_stats.
    """
def exit_stats_workspace(head_dtype: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, vocab: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, topk: typing.SupportsInt | typing.SupportsIndex, draws: bool, threads: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes of workspace that exit_stats needs.
    """
def isa() -> str:
    """
    The instruction set in use.
    """
def kv_fill(hidden: typing.SupportsInt | typing.SupportsIndex, hidden_dtype: typing.SupportsInt | typing.SupportsIndex, hidden_stride: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, heads: typing.SupportsInt | typing.SupportsIndex, head_size: typing.SupportsInt | typing.SupportsIndex, rotary: typing.SupportsInt | typing.SupportsIndex, source: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], from_layer: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], batch_rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], slots: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], dtype: typing.SupportsInt | typing.SupportsIndex, norm: typing.SupportsInt | typing.SupportsIndex, eps: typing.SupportsFloat | typing.SupportsIndex, key_norm: typing.SupportsInt | typing.SupportsIndex, key_eps: typing.SupportsFloat | typing.SupportsIndex, shift: typing.SupportsFloat | typing.SupportsIndex, interleaved: bool, table: typing.SupportsInt | typing.SupportsIndex, places: typing.SupportsInt | typing.SupportsIndex, tables: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], until: typing.SupportsInt | typing.SupportsIndex, workspace: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Keys and values of skipped layers; see exeunt.ops.kv_fill.
    """
def kv_fill_workspace(dtype: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, layers: typing.SupportsInt | typing.SupportsIndex, head_size: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes of workspace that kv_fill needs.
    """
def saturation(a: typing.SupportsInt | typing.SupportsIndex, a_dtype: typing.SupportsInt | typing.SupportsIndex, a_stride: typing.SupportsInt | typing.SupportsIndex, b: typing.SupportsInt | typing.SupportsIndex, b_dtype: typing.SupportsInt | typing.SupportsIndex, b_stride: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Cosine of pairs of rows; see exeunt.ops.saturation.
    """
def select_isa(limit: str = '') -> str:
    """
    Choose the best instruction set of this machine that is not above `limit`; returns its name.
    """
def small_head(hidden: typing.SupportsInt | typing.SupportsIndex, hidden_dtype: typing.SupportsInt | typing.SupportsIndex, hidden_stride: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, norm: typing.SupportsInt | typing.SupportsIndex, norm_weight: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], norm_bias: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], eps: typing.SupportsFloat | typing.SupportsIndex, pooler: tuple[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], head: tuple[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, bool, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], out: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fused norm, pooler and head of few classes; see exeunt.ops.small_head.
    """
version: str = '0.1.0'
