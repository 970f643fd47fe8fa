"""The fused ops: what model code calls."""

from exeunt.ops.exit_stats import exit_stats

__all__ = ["exit_stats"]
