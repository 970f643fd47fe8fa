"""
CUDA kernels of exeunt: plain pointers and integers, validated by exeunt.ops.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['KvFill', 'built_archs', 'compact', 'compute_capability', 'device_count', 'exit_stats', 'exit_stats_workspace', 'expand', 'largest_head', 'ragged_attention', 'ragged_attention_workspace', 'runtime_version', 'saturation', 'small_head', 'small_head_workspace', 'takes_float8', 'version']
class KvFill:
    """
    kv_fill for one stack; see exeunt.ops.kv_fill.
    """
    def __init__(self, width: typing.SupportsInt | typing.SupportsIndex, heads: typing.SupportsInt | typing.SupportsIndex, head_size: typing.SupportsInt | typing.SupportsIndex, dtype: typing.SupportsInt | typing.SupportsIndex, norm: typing.SupportsInt | typing.SupportsIndex, eps: typing.SupportsFloat | typing.SupportsIndex, key_norm: typing.SupportsInt | typing.SupportsIndex, key_eps: typing.SupportsFloat | typing.SupportsIndex, shift: typing.SupportsFloat | typing.SupportsIndex, interleaved: bool, form: typing.SupportsInt | typing.SupportsIndex, layers: typing.SupportsInt | typing.SupportsIndex, table: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def fill(self, hidden: typing.SupportsInt | typing.SupportsIndex, hidden_dtype: typing.SupportsInt | typing.SupportsIndex, hidden_stride: typing.SupportsInt | typing.SupportsIndex, rows: tuple[int, ...], places: typing.SupportsInt | typing.SupportsIndex, tables: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], tables_dtype: typing.SupportsInt | typing.SupportsIndex, rotary: typing.SupportsInt | typing.SupportsIndex, workspace: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Write the rows' keys and values.
        """
    def workspace(self, rows: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Bytes of workspace for that many rows.
        """
def built_archs() -> str:
    """
    Architectures that this module holds kernels for, as CMake names them.
    """
def compact(mask: typing.SupportsInt | typing.SupportsIndex, stride: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Rows of a mask first; see exeunt.ops.compact.
    """
def compute_capability(device: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Of a device, for example 90.
    """
def device_count() -> int:
    """
    CUDA devices that can be used now.
    """
def exit_stats(hidden: typing.SupportsInt | typing.SupportsIndex, hidden_dtype: typing.SupportsInt | typing.SupportsIndex, hidden_stride: typing.SupportsInt | typing.SupportsIndex, hidden_rows: typing.SupportsInt | typing.SupportsIndex, head: tuple[int, ...], head_rows: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, vocab: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, row_list: typing.SupportsInt | typing.SupportsIndex, row_list_64: bool, count: typing.SupportsInt | typing.SupportsIndex, count_64: bool, head_bias: tuple[int, ...], norm: typing.SupportsInt | typing.SupportsIndex, norm_weight: tuple[int, ...], norm_bias: tuple[int, ...], eps: typing.SupportsFloat | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, temperature: typing.SupportsFloat | typing.SupportsIndex, logits_out: typing.SupportsInt | typing.SupportsIndex, logits_dtype: typing.SupportsInt | typing.SupportsIndex, logits_stride: typing.SupportsInt | typing.SupportsIndex, entropy: bool, columns: typing.SupportsInt | typing.SupportsIndex, target: typing.SupportsInt | typing.SupportsIndex, target_out: typing.SupportsInt | typing.SupportsIndex, topk: typing.SupportsInt | typing.SupportsIndex, topk_logits: typing.SupportsInt | typing.SupportsIndex, topk_ids: typing.SupportsInt | typing.SupportsIndex, seeds: typing.SupportsInt | typing.SupportsIndex, sample: typing.SupportsInt | typing.SupportsIndex, argmax: typing.SupportsInt | typing.SupportsIndex, top1: typing.SupportsInt | typing.SupportsIndex, top2: typing.SupportsInt | typing.SupportsIndex, sumexp: typing.SupportsInt | typing.SupportsIndex, weighted: typing.SupportsInt | typing.SupportsIndex, workspace: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fused norm, head and online softmax; see exeunt.ops.exit_stats.
    """
def exit_stats_workspace(head_dtype: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, vocab: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, topk: typing.SupportsInt | typing.SupportsIndex, draws: bool) -> int:
    """
    Bytes of workspace that exit_stats needs.
    """
def expand(rows: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, compacted: typing.SupportsInt | typing.SupportsIndex, into: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, row_bytes: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Rows back in their places; see exeunt.ops.expand.
    """
def ragged_attention(q: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], dtype: typing.SupportsInt | typing.SupportsIndex, shape: tuple[int, ...], q_indptr: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, kv_len: typing.SupportsInt | typing.SupportsIndex, kv_start: typing.SupportsInt | typing.SupportsIndex, positions: typing.SupportsInt | typing.SupportsIndex, entries: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, count_64: bool, causal: bool, window: typing.SupportsInt | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, alibi: typing.SupportsInt | typing.SupportsIndex, bias: tuple[int, ...], bias_dtype: typing.SupportsInt | typing.SupportsIndex, bias_keys: typing.SupportsInt | typing.SupportsIndex, pages: tuple[int, ...], page_rows: typing.SupportsInt | typing.SupportsIndex, page_columns: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, workspace: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Attention over ragged rows; see exeunt.ops.ragged_attention.
    """
def ragged_attention_workspace(tokens: typing.SupportsInt | typing.SupportsIndex, heads: typing.SupportsInt | typing.SupportsIndex, kv_heads: typing.SupportsInt | typing.SupportsIndex, entries: typing.SupportsInt | typing.SupportsIndex, room: typing.SupportsInt | typing.SupportsIndex, value_size: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes of workspace that ragged_attention needs.
    """
def runtime_version() -> int:
    """
    CUDA runtime this module was built with.
    """
def saturation(a: typing.SupportsInt | typing.SupportsIndex, a_dtype: typing.SupportsInt | typing.SupportsIndex, a_stride: typing.SupportsInt | typing.SupportsIndex, b: typing.SupportsInt | typing.SupportsIndex, b_dtype: typing.SupportsInt | typing.SupportsIndex, b_stride: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, out: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Cosine of pairs of rows; see exeunt.ops.saturation.
    """
def small_head(hidden: typing.SupportsInt | typing.SupportsIndex, hidden_dtype: typing.SupportsInt | typing.SupportsIndex, hidden_stride: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, norm: typing.SupportsInt | typing.SupportsIndex, norm_weight: tuple[int, ...], norm_bias: tuple[int, ...], eps: typing.SupportsFloat | typing.SupportsIndex, pooler: tuple[int, ...], head: tuple[int, ...], out: typing.SupportsInt | typing.SupportsIndex, workspace: typing.SupportsInt | typing.SupportsIndex, device: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Fused norm, pooler and head of few classes; see exeunt.ops.small_head.
    """
def small_head_workspace(dtype: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, width: typing.SupportsInt | typing.SupportsIndex, pooled: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes of workspace that small_head needs.
    """
largest_head: int = 256
takes_float8: bool = True
version: str = '0.1.0'
