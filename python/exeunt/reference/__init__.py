"""The ops in plain torch: any dtype, any device, differentiable. The specification that every kernel is held to."""

from exeunt.reference.compact import compact, expand
from exeunt.reference.exit_stats import exit_stats
from exeunt.reference.kv_fill import kv_fill
from exeunt.reference.ragged_attention import ragged_attention
from exeunt.reference.small_head import classify, probe, saturation, small_head

__all__ = [
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
