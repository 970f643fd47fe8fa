"""Are the contracts kept, and how far do they stay below what they promise?

Each line of the table: 2,000 calibrations on independent draws from a population whose risk is known exactly, at
every threshold. `python benchmarks/guarantees.py` prints the table, `--write` puts it into docs/calibration.md; the
tests assert the same cases.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from exeunt.calibration import conformal, first_exit, learn_then_test, risk_control

DRAWS = 2000
CONFIDENCE = 0.9
LEVELS = {20: 0.25, 200: 0.1, 2000: 0.05}  # by calibration size
DOCS = Path(__file__).parents[1] / "docs" / "calibration.md"

PAC: dict[str, Callable[[np.ndarray, float], int | None]] = {
    "learn_then_test, hoeffding_bentkus": lambda x, level: learn_then_test(x, level, CONFIDENCE),
    "learn_then_test, hoeffding": lambda x, level: learn_then_test(x, level, CONFIDENCE, "hoeffding"),
    "learn_then_test, binomial": lambda x, level: learn_then_test(x, level, CONFIDENCE, "binomial"),
    "risk_control, wsr": lambda x, level: risk_control(x, level, "wsr", confidence=CONFIDENCE),
}
CRC = "risk_control, crc"
CONFORMAL = ("shared", "independent", "unconditional")


class Population(NamedTuple):
    """Examples to draw from: scores [N, 3] of three exits, losses [N, 4] of leaving at each and of full depth."""

    scores: np.ndarray
    losses: np.ndarray

    def loss(self, thresholds: np.ndarray | float) -> np.ndarray:
        """Loss [N] of every example."""
        return self.losses[np.arange(len(self.losses)), first_exit(self.scores, thresholds)]


@functools.cache
def population(kind: str, size: int = 5000) -> Population:
    """Examples of random difficulty; later exits are right more often, and scores are informative but noisy.

    "continuous": every score differs; "tied": 41 values; "fractional": losses of a half, too.
    """
    rng = np.random.default_rng(7)
    difficulty = rng.normal(size=(size, 1))
    ease = np.array([-0.9, 0.6, 2.0]) - difficulty
    noise = rng.logistic(size=(size, 3))
    scores = 1 / (1 + np.exp(-(1.2 * ease + 0.5 * rng.normal(size=(size, 3)))))
    losses = (1.5 * ease + noise < 0).astype(float)
    if kind == "fractional":
        losses *= rng.integers(1, 3, size=losses.shape) / 2
    if kind == "tied":
        scores = (40 * scores).round() / 40
    return Population(scores.astype(np.float32), np.concatenate([losses, np.zeros((size, 1))], axis=1))


FINE = np.linspace(1.0, 0.0, 4001)


@functools.cache
def _risks(kind: str) -> np.ndarray:
    """True risk [4001] at each of FINE's thresholds."""
    return np.maximum.accumulate([population(kind).loss(t).mean() for t in FINE])


def grid(kind: str, level: float, count: int) -> np.ndarray:
    """Candidates from safe to loose, with risks from 0.2 to 1.8 times the level as far as ties allow.

    One of them is just above the level (1 % where nothing ties): that is where a contract breaks first.
    """
    return FINE[np.searchsorted(_risks(kind), level * (1.01 + np.linspace(-0.8, 0.8, count)))]


class Outcome(NamedTuple):
    """What the calibrations of one case came to."""

    method: str
    kind: str
    n: int
    candidates: int | None
    level: float
    promised: float | None  # share of calibrations that may exceed the level; None: only their mean may not
    risks: np.ndarray  # [draws] true risk of what each calibration chose

    @property
    def violated(self) -> float:
        """Share of the calibrations whose true risk exceeds the level."""
        return float((self.risks > self.level + 1e-12).mean())

    @property
    def kept(self) -> bool:
        """Whether the contract held, up to three standard errors."""
        if self.promised is None:
            error = self.risks.std(ddof=1) / math.sqrt(len(self.risks))
            return bool(self.risks.mean() <= self.level + 3 * error)
        return self.violated <= self.promised + 3 * math.sqrt(self.promised * (1 - self.promised) / len(self.risks))


def on_a_grid(
    method: str,
    choose: Callable[[np.ndarray, float], int | None],
    promised: float | None,
    kind: str,
    n: int,
    count: int,
) -> Outcome:
    """Calibrate by choosing a row of losses."""
    level, people = LEVELS[n], population(kind)
    losses = np.stack([people.loss(t) for t in grid(kind, level, count)])
    true, table = losses.mean(1), np.ascontiguousarray(losses.T)
    rng = np.random.default_rng(n + count)
    picks = [choose(table[rng.integers(len(table), size=n)].T, level) for _ in range(DRAWS)]
    return Outcome(
        method, kind, n, count, level, promised, np.array([0.0 if pick is None else true[pick] for pick in picks])
    )


def conformally(variant: str, kind: str, n: int) -> Outcome:
    """Calibrate thresholds directly."""
    level, people = LEVELS[n], population(kind)
    consistent = people.losses[:, :3] == 0
    rng = np.random.default_rng(n)
    risks = []
    for _ in range(DRAWS):
        i = rng.integers(len(consistent), size=n)
        risks.append((people.loss(conformal(people.scores[i], consistent[i], level, variant)) > 0).mean())
    return Outcome(f"conformal, {variant}", kind, n, None, level, None, np.array(risks))


CASES: list[Callable[[], Outcome]] = []
for _kind, _n, _count in (
    ("continuous", 20, 9), ("continuous", 20, 101), ("continuous", 200, 9), ("continuous", 200, 101),
    ("continuous", 2000, 9), ("tied", 20, 9), ("tied", 200, 101), ("fractional", 20, 9), ("fractional", 200, 101),
):  # fmt: skip
    for _method, _choose in PAC.items():
        if _kind != "fractional" or "binomial" not in _method:
            CASES.append(functools.partial(on_a_grid, _method, _choose, 1 - CONFIDENCE, _kind, _n, _count))
    CASES.append(functools.partial(on_a_grid, CRC, risk_control, None, _kind, _n, _count))
CASES.append(functools.partial(on_a_grid, *next(iter(PAC.items())), 1 - CONFIDENCE, "continuous", 2000, 101))
CASES.append(functools.partial(on_a_grid, CRC, risk_control, None, "continuous", 2000, 101))
for _variant in CONFORMAL:
    for _kind, _n in (("continuous", 20), ("continuous", 200), ("continuous", 2000), ("tied", 200)):
        CASES.append(functools.partial(conformally, _variant, _kind, _n))


def table(outcomes: list[Outcome]) -> str:
    """Markdown, methods together."""
    lines = [
        "| method | losses | n | candidates | level | above the level (promised) | mean risk / level | never exits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for o in sorted(outcomes, key=lambda o: (o.promised is None, o.method, o.n, o.kind, o.candidates)):
        promised = "on average" if o.promised is None else f"{o.promised:.0%}"
        cells = (
            o.method, o.kind, f"{o.n:,}", o.candidates or "", f"{o.level:g}", f"{o.violated:.1%} ({promised})",
            f"{o.risks.mean() / o.level:.2f}", f"{(o.risks == 0).mean():.0%}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def into_docs(command: str, text: str) -> None:
    """Replace what stands in docs/calibration.md between the comment that names the command and the next end."""
    begin, end = f"<!-- {command} -->\n", "<!-- end -->\n"
    before, old = DOCS.read_text().split(begin)
    DOCS.write_text(before + begin + text + end + old.split(end, 1)[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/calibration.md")
    write = parser.parse_args().write
    outcomes = [case() for case in track(CASES, "Calibrating", console=Console(stderr=True), transient=True)]
    text = table(outcomes)
    if write:
        into_docs("python benchmarks/guarantees.py --write", text)
    else:
        print(text, end="")
    sys.exit(0 if all(o.kept for o in outcomes) else "a contract was broken: see the table")
