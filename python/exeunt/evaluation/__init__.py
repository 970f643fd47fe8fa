"""Evaluation: recordings, curves of every recipe, plans, reports."""

from exeunt.evaluation.record import load, record
from exeunt.evaluation.sweep import baselines, frontier, sweep

__all__ = ["baselines", "frontier", "load", "record", "sweep"]
