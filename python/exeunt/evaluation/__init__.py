"""Evaluation: recordings, curves of every recipe, plans, reports."""

from exeunt.evaluation.encoders import runner
from exeunt.evaluation.npz import of_npz
from exeunt.evaluation.planner import Costs, Plan, measure_costs, plan
from exeunt.evaluation.record import load, record
from exeunt.evaluation.report import report
from exeunt.evaluation.sweep import baselines, frontier, sweep
from exeunt.evaluation.tokens import live_check, record_tokens

__all__ = [
    "Costs",
    "Plan",
    "baselines",
    "frontier",
    "live_check",
    "load",
    "measure_costs",
    "of_npz",
    "plan",
    "record",
    "record_tokens",
    "report",
    "runner",
    "sweep",
]
