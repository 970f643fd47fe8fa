"""Training exits: objectives, the loop that fits them, and what it fits."""

from exeunt.training.loop import adamw, fit, muon, schedule, written
from exeunt.training.modules import Joint, Recorded, select
from exeunt.training.objectives import (
    CrossEntropy,
    Depth,
    Distillation,
    LayerwiseDistillation,
    LogitTerm,
    Objective,
    ProbeLoss,
    StateTerm,
    depth_weights,
)
from exeunt.training.text import Windows

__all__ = [
    "CrossEntropy",
    "Depth",
    "Distillation",
    "Joint",
    "LayerwiseDistillation",
    "LogitTerm",
    "Objective",
    "ProbeLoss",
    "Recorded",
    "StateTerm",
    "Windows",
    "adamw",
    "depth_weights",
    "fit",
    "muon",
    "schedule",
    "select",
    "written",
]
