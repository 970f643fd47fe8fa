"""exeunt: early-exit inference for transformers.

A token that is already certain halfway up the stack leaves there: fused confidence kernels, exit rules, and a plug
for stock transformers models. Start with :func:`exeunt.attach` and :mod:`exeunt.recipes`, or with the fused op
:func:`exeunt.ops.exit_stats` alone.
"""

import importlib as _importlib
import typing as _typing

from exeunt import (
    calibration,
    classifier_heads,
    confidence,
    heads,
    ops,
    policies,
    recipes,
    reference,
    replay,
    states,
    words,
)
from exeunt.attach import Attached, attach
from exeunt.cascade import Cascade
from exeunt.memory import huge_pages
from exeunt.models import register_attention
from exeunt.pipeline import pipeline
from exeunt.report import Report
from exeunt.stats import ExitStats

if _typing.TYPE_CHECKING:
    from exeunt import evaluation, small_lm, training
else:

    def __getattr__(name: str) -> object:
        """Import, when it is first asked for, what few programs need."""
        if name in ("evaluation", "small_lm", "training"):
            return _importlib.import_module(f"exeunt.{name}")
        raise AttributeError(f"module 'exeunt' has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "Attached",
    "Cascade",
    "ExitStats",
    "Report",
    "__version__",
    "attach",
    "calibration",
    "classifier_heads",
    "confidence",
    "evaluation",
    "heads",
    "huge_pages",
    "ops",
    "pipeline",
    "policies",
    "recipes",
    "reference",
    "register_attention",
    "replay",
    "small_lm",
    "states",
    "training",
    "words",
]
