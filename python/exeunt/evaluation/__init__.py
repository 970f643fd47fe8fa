"""Evaluation: recordings, curves of every recipe, plans, reports."""

from exeunt.evaluation.encoders import runner
from exeunt.evaluation.planner import Costs, Plan, measure_costs, plan
from exeunt.evaluation.record import load, of_npz, record
from exeunt.evaluation.report import report
from exeunt.evaluation.sweep import baselines, frontier, sweep

__all__ = [
    "Costs",
    "Plan",
    "baselines",
    "frontier",
    "load",
    "measure_costs",
    "of_npz",
    "plan",
    "record",
    "report",
    "runner",
    "sweep",
]
