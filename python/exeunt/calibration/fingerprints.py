"""Fingerprints: which model, heads and data a calibration belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from exeunt import heads

__all__ = ["of_data", "of_model", "of_weights", "refuse_overlap"]

SAMPLES = 64  # of each parameter


def of_weights(module: nn.Module) -> str:
    """Digest of a module's parameters: shapes, dtypes and 64 evenly spaced values of each.

    A fraction of a second for billions of parameters, and fine-tuning changes it.

    Examples
    --------
    >>> import torch
    >>> from exeunt.calibration import fingerprints
    >>> len(fingerprints.of_weights(torch.nn.Linear(4, 4)))
    64
    """
    digest = hashlib.sha256()
    samples = []
    for parameter in module.parameters():
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].double())
        digest.update(f"{list(parameter.shape)} {parameter.dtype};".encode())
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def of_model(model: Any) -> dict[str, int | str]:
    """What must agree for thresholds to mean the same: configuration, dtype and weights.

    Parameters
    ----------
    model : nn.Module
        A transformers model.

    Returns
    -------
    dict
        :func:`exeunt.heads.fingerprint` of its configuration, ``dtype`` and ``weights``.
    """
    dtype = next(model.parameters()).dtype
    return heads.fingerprint(model.config) | {"dtype": str(dtype), "weights": of_weights(model)}


def of_data(units: Iterable[str | bytes | Sequence[int] | torch.Tensor]) -> tuple[str, ...]:
    """Digest of each unit of data, in order: texts, bytes, or token ids.

    Examples
    --------
    >>> from exeunt.calibration import fingerprints
    >>> fingerprints.of_data(["a text"]) == fingerprints.of_data([b"a text"])
    True
    """
    return tuple(hashlib.sha256(_bytes(unit)).hexdigest()[:16] for unit in units)


def _bytes(unit: str | bytes | Sequence[int] | torch.Tensor) -> bytes:
    if isinstance(unit, str):
        return unit.encode()
    if isinstance(unit, bytes):
        return unit
    return np.ascontiguousarray(unit, dtype=np.int64).tobytes()


def refuse_overlap(calibration: Iterable[Any], training: Iterable[Any]) -> None:
    """Raise ValueError where calibration data was trained on: no contract holds then.

    Parameters
    ----------
    calibration, training : iterable
        Units as for :func:`of_data`; equal units are found, similar ones are not.

    Examples
    --------
    >>> from exeunt.calibration import fingerprints
    >>> fingerprints.refuse_overlap(["a", "b"], ["c"])
    """
    units, seen = of_data(calibration), set(of_data(training))
    shared = [i for i, unit in enumerate(units) if unit in seen]
    if shared:
        raise ValueError(
            f"calibration data must be apart from training data, got {len(shared)} of {len(units)} units in both, "
            f"the first at {shared[0]}"
        )
