"""The fused ops: what model code calls."""

from exeunt.ops._backend import DTYPES
from exeunt.ops.compact import compact, expand
from exeunt.ops.exit_stats import exit_stats

__all__ = ["DTYPES", "compact", "exit_stats", "expand"]
