"""What a model was trained on: a file in its folder, so that nobody calibrates on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["TRAINING_FILE", "history", "sketches"]

TRAINING_FILE = "training.json"


def history(model: Any) -> dict[str, Any]:
    """What the folder that a transformers model was loaded from says of its training; empty if it says nothing.

    ``before`` in it is the same of the model that this one was made of.

    Raises
    ------
    ValueError
        If the file is there and holds something else: one sentence.

    Examples
    --------
    >>> from exeunt import small_lm
    >>> from exeunt.training import history
    >>> sorted(history(small_lm.load()[0]))
    ['held_out', 'runs', 'sketch', 'text']
    """
    folder = getattr(model, "name_or_path", "")  # empty for a model that was made here
    file = Path(folder, TRAINING_FILE)
    if not folder or not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must say in JSON what the model was trained on, got something else")
    return found


def sketches(model: Any) -> list[str]:
    """Sketches (:func:`exeunt.calibration.fingerprints.sketch`) of all that a model was trained on.

    Examples
    --------
    >>> from exeunt import small_lm
    >>> from exeunt.training import sketches
    >>> len(sketches(small_lm.load()[0]))
    1
    """
    told, about = [], history(model)
    while about:
        told += [about["sketch"]] if about.get("sketch") else []
        about = about.get("before", {})
    return told
