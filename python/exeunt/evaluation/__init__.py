"""Evaluation: recordings, curves of every recipe, plans, reports."""

from exeunt.evaluation.encoders import runner
from exeunt.evaluation.planner import Costs, Plan, measure_costs, plan
from exeunt.evaluation.record import load, record
from exeunt.evaluation.sweep import baselines, frontier, sweep

__all__ = [
    "Costs",
    "Plan",
    "baselines",
    "frontier",
    "load",
    "measure_costs",
    "plan",
    "record",
    "runner",
    "sweep",
]
