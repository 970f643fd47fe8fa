"""The fused ops: what model code calls."""

from exeunt.ops._backend import DTYPES
from exeunt.ops.classify import Check, classify
from exeunt.ops.compact import compact, expand
from exeunt.ops.exit_stats import exit_stats
from exeunt.ops.fp8_head import Fp8Head
from exeunt.ops.kv_fill import kv_fill
from exeunt.ops.kv_stack import KVCache, KVLayer, KVStack
from exeunt.ops.packed_head import PackedHead
from exeunt.ops.ragged_attention import ragged_attention
from exeunt.ops.small_head import probe, saturation, small_head

__all__ = [
    "DTYPES",
    "Check",
    "Fp8Head",
    "KVCache",
    "KVLayer",
    "KVStack",
    "PackedHead",
    "classify",
    "compact",
    "exit_stats",
    "expand",
    "kv_fill",
    "probe",
    "ragged_attention",
    "saturation",
    "small_head",
]
