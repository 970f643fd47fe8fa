"""Fingerprints: which model, heads and data a calibration belongs to."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from exeunt import heads

__all__ = ["of_data", "of_heads", "of_model", "of_weights", "refuse_overlap", "refuse_trained", "sketch"]

SAMPLES = 64  # of each tensor
PHRASE = 12  # tokens
KEPT = 128  # one phrase of so many


def of_weights(module: nn.Module) -> str:
    """Digest of what a module would save, parameters and buffers: shapes, dtypes and 64 evenly spaced values of each.

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
    for tensor in module.state_dict().values():
        if not isinstance(tensor, torch.Tensor):  # what a quantised module keeps beside its tensors
            continue
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].double())
        digest.update(f"{list(tensor.shape)} {tensor.dtype};".encode())
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def of_heads(exit_heads: heads.ExitHeads) -> str:
    """Digest of exit heads: their weights, where they sit, and what they do with them (kinds, pooling, sizes, eps).

    Examples
    --------
    >>> from exeunt.calibration import fingerprints
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> first, mean = (LinearHead(8, 2, pooling) for pooling in ("first", "mean"))
    >>> _ = mean.load_state_dict(first.state_dict())
    >>> fingerprints.of_heads(ClassifierHeads({0: first})) == fingerprints.of_heads(ClassifierHeads({0: mean}))
    False
    """
    parts = {
        name: [type(part).__name__, {
            option: value for option, value in sorted(vars(part).items())
            if isinstance(value, (int, float, str)) and option != "training" and not option.startswith("_")
        }]
        for name, part in exit_heads.named_modules()
    }  # fmt: skip
    return hashlib.sha256(json.dumps([parts, of_weights(exit_heads)]).encode()).hexdigest()


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

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.calibration import fingerprints
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> own = fingerprints.of_model(model)
    >>> own["model_type"], own["dtype"], own["weights"] == fingerprints.of_weights(model)
    ('llama', 'torch.float32', True)
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


def sketch(tokens: ArrayLike) -> str:
    """What a training set leaves behind, so that later data can be held against it: digests of a sample of its phrases.

    Every run of 12 tokens is hashed, and one in 128 kept, chosen by the hash itself: the same phrases in any text.
    About 42 bytes for a thousand tokens.

    Parameters
    ----------
    tokens : array
        [N] token ids, or [R, S] rows of them.

    Returns
    -------
    str
        For metadata; :func:`refuse_trained` reads it.

    Examples
    --------
    >>> from exeunt.calibration import fingerprints
    >>> fingerprints.sketch(range(1000)) == fingerprints.sketch(range(1000))
    True
    """
    return base64.b64encode(np.unique(_phrases(tokens)).tobytes()).decode()


def refuse_trained(units: ArrayLike, trained: str, allowed: float = 0.2) -> None:
    """Raise ValueError where much of the calibration data was trained on, by its phrases.

    Unlike :func:`refuse_overlap` this needs no copy of the training data and does not mind where texts were cut.
    Phrases recur in any text, so that a share of known ones is allowed.

    Parameters
    ----------
    units : array
        [n, S] token ids.
    trained : str
        From :func:`sketch`.
    allowed : float, default 0.2
        Share of the phrases that may be known.

    Examples
    --------
    >>> import numpy as np
    >>> from exeunt.calibration import fingerprints
    >>> text = np.random.default_rng(0).integers(0, 500, 20_000)
    >>> fingerprints.refuse_trained(text[:10_000].reshape(100, 100), fingerprints.sketch(text[10_000:]))
    """
    phrases = _phrases(units)
    known = np.isin(phrases, np.frombuffer(base64.b64decode(trained), np.uint32))
    share = float(known.mean()) if len(phrases) else 0.0
    if share > allowed:
        raise ValueError(
            f"calibration data must be apart from training data, got {share:.0%} of its phrases in both "
            f"({allowed:.0%} may be)"
        )


def _phrases(tokens: ArrayLike) -> NDArray[np.uint32]:
    x = np.atleast_2d(np.asarray(tokens)).astype(np.uint64)
    count = x.shape[1] - PHRASE + 1
    if count < 1:
        return np.empty(0, np.uint32)
    h = np.zeros((len(x), count), np.uint64)
    with np.errstate(over="ignore"):
        for k in range(PHRASE):
            h = h * np.uint64(0x9E3779B97F4A7C15) + x[:, k : k + count] + np.uint64(1)
        h ^= h >> np.uint64(29)
        h *= np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(32)
    return (h[h % np.uint64(KEPT) == 0] >> np.uint64(32)).astype(np.uint32)
