"""Thresholds with a contract: plain functions of arrays, and the artefact that carries what was promised.

Which to choose, what each promises and how far it stays below that: ``docs/calibration.md``. Arrays may be numpy's,
torch's or nested lists. The unit of exchangeability is the prompt or the example, never the token.
"""

import importlib as _importlib
import typing as _typing

from exeunt.calibration import fingerprints, risks
from exeunt.calibration.artefact import Calibration
from exeunt.calibration.audit import Audit
from exeunt.calibration.beta_mixture import beta_mixture
from exeunt.calibration.budget import budget
from exeunt.calibration.conformal import conformal
from exeunt.calibration.contract import Contract
from exeunt.calibration.error_rates import error_rates
from exeunt.calibration.learn_then_test import learn_then_test
from exeunt.calibration.leaving import first_exit
from exeunt.calibration.risk_control import risk_control
from exeunt.calibration.temperature import temperature, temperatures
from exeunt.calibration.utility import utility

if _typing.TYPE_CHECKING:
    from exeunt.calibration import calibrating, live, shadow
else:

    def __getattr__(name: str) -> object:
        """Import, when they are first asked for, what runs models: it imports modules that import this one."""
        if name in ("calibrating", "live", "shadow"):
            return _importlib.import_module(f"exeunt.calibration.{name}")
        raise AttributeError(f"module 'exeunt.calibration' has no attribute {name!r}")


__all__ = [
    "Audit",
    "Calibration",
    "Contract",
    "beta_mixture",
    "budget",
    "calibrating",
    "conformal",
    "error_rates",
    "fingerprints",
    "first_exit",
    "learn_then_test",
    "live",
    "risk_control",
    "risks",
    "shadow",
    "temperature",
    "temperatures",
    "utility",
]
