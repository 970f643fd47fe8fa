"""Training exits: objectives, the loop that fits them, and what it fits."""

from exeunt.training.candidates import train_candidate_probes
from exeunt.training.exits import HEADS_FILE, train_exits
from exeunt.training.history import TRAINING_FILE, history, sketches
from exeunt.training.leaving import PASSED, SAID, Leaving
from exeunt.training.loop import adamw, fit, muon, schedule
from exeunt.training.measures import judge, summary
from exeunt.training.modules import Joint, Recorded, select
from exeunt.training.objectives import Objective, parse
from exeunt.training.recording import Recording, record
from exeunt.training.tagging import SelfSampling, Tagging
from exeunt.training.terms import (
    CrossEntropy,
    Depth,
    Distillation,
    LayerwiseDistillation,
    LogitTerm,
    ProbeLoss,
    StateTerm,
    depth_weights,
)
from exeunt.training.text import Windows, tokenised

__all__ = [
    "HEADS_FILE",
    "PASSED",
    "SAID",
    "TRAINING_FILE",
    "CrossEntropy",
    "Depth",
    "Distillation",
    "Joint",
    "LayerwiseDistillation",
    "Leaving",
    "LogitTerm",
    "Objective",
    "ProbeLoss",
    "Recorded",
    "Recording",
    "SelfSampling",
    "StateTerm",
    "Tagging",
    "Windows",
    "adamw",
    "depth_weights",
    "fit",
    "history",
    "judge",
    "muon",
    "parse",
    "record",
    "schedule",
    "select",
    "sketches",
    "summary",
    "tokenised",
    "train_candidate_probes",
    "train_exits",
]
