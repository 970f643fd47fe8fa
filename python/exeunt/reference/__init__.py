"""The ops in plain torch: the executable specification, for any dtype and device, and differentiable."""

from exeunt.reference.compact import compact, expand
from exeunt.reference.exit_stats import exit_stats

__all__ = ["compact", "exit_stats", "expand"]
