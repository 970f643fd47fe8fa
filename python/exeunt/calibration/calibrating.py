"""From a model, a recipe and data to a threshold with a contract: by live runs, or by replay where that is exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from exeunt.calibration import fingerprints
from exeunt.calibration._checks import Array
from exeunt.calibration.artefact import Calibration
from exeunt.calibration.contract import Contract
from exeunt.calibration.learn_then_test import learn_then_test
from exeunt.calibration.live import Live, live_losses
from exeunt.calibration.risk_control import risk_control
from exeunt.calibration.risks import label_disagreement
from exeunt.policies import Threshold
from exeunt.recipes import Recipe
from exeunt.replay import Recording, replay

__all__ = ["METHODS", "Calibrated", "calibrate", "calibrate_recorded"]

METHODS = {
    "ltt": "learn then test: the risk of this threshold is at most the level, with the confidence",
    "wsr": "the same by betting: stronger where losses are fractional or vary little",
    "crc": "conformal risk control: at most the level on average over calibrations, no confidence",
}
NAMES = {"ltt": "learn_then_test, hoeffding_bentkus", "wsr": "risk_control, wsr", "crc": "risk_control, crc"}
RISK_NAMES = {"next-token": "next-token disagreement", "token": "token disagreement", "rouge-l": "1 - ROUGE-L",
              "bleu": "1 - BLEU"}  # fmt: skip


class Calibrated(NamedTuple):
    """What a calibration found.

    Attributes
    ----------
    calibration : Calibration
        To be saved, and given to `attach`.
    threshold : float
        inf where not even the safest candidate passed, but full depth did.
    live : Live
        Losses and layers of the candidates that were run.

    Examples
    --------
    >>> import torch, exeunt
    >>> from exeunt.calibration.calibrating import calibrate_recorded
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=3, num_attention_heads=4))
    >>> z = torch.randn(200, 1, 2).expand(-1, 3, -1)  # every exit says what full depth says
    >>> recording = exeunt.replay.Recording.of_logits(z)
    >>> found = calibrate_recorded(model, exeunt.recipes.right_tool(), recording, [0.9, 0.6], level=0.05)
    >>> found.calibration.thresholds, found.live.losses.mean(1)
    ({0: 0.6, 1: 0.6}, array([0., 0.]))
    """

    calibration: Calibration
    threshold: float
    live: Live


def calibrate(
    model: Any,
    recipe: Recipe,
    texts: Any,
    candidates: Sequence[float],
    *,
    level: float,
    confidence: float | None = 0.95,
    method: str = "ltt",
    risk: str = "next-token",
    prompt: int = 64,
    tokenizer: Any = None,
    batch: int = 8,
    trained: Iterable[str] = (),
    advance: Callable[[int], None] = lambda texts: None,
) -> Calibrated:
    """Find the loosest threshold whose risk is controlled, by live runs on texts.

    Parameters
    ----------
    model : transformers model for causal language modelling
        Without exits.
    recipe : Recipe
        With a `Threshold` policy, whose value does not matter.
    texts : array
        [n, S] token ids, each drawn independently: the units. Not trained on.
    candidates : sequence of float
        Thresholds from safe to loose, fixed before the texts were seen; inf is tested ahead of them in any case.
    level : float
        Risk to stay below, between 0 and 1.
    confidence : float, default 0.95
        Not for ``crc``.
    method : str, default "ltt"
        One of `METHODS`.
    risk : str, default "next-token"
        One of `exeunt.calibration.live.RISKS`.
    prompt : int, default 64
        Tokens of a text that are its prompt.
    tokenizer : transformers tokenizer, optional
        For risks that compare words.
    batch : int, default 8
        Texts decoded together.
    trained : iterable of str
        Sketches (:func:`exeunt.calibration.fingerprints.sketch`) of what model and heads were trained on.
    advance : callable, optional
        Told the number of texts after each batch: n for the model alone, and at most n for the recipe without exits
        and for each candidate.

    Returns
    -------
    Calibrated

    Raises
    ------
    ValueError
        One sentence: too few texts for the level, texts that were trained on, candidates that do not descend, a risk
        that is not even kept without exits.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.calibration.calibrating import calibrate
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> found = calibrate(model, exeunt.recipes.calm([1]), torch.randint(64, (40, 9)), [0.9, 0.8], level=0.2, prompt=4)
    >>> found.threshold, found.calibration.contract.risk
    (0.8, 'next-token disagreement')
    """
    x = np.asarray(texts)
    _check(candidates, method)
    if method == "crc":
        confidence = None
    grid = _with_full_depth(candidates)
    # Nothing is run that cannot pass: without any loss every method says how many texts would do.
    _choose(np.zeros((len(grid), len(x))), level, confidence, method, grid)
    for known in trained:
        fingerprints.refuse_trained(x, known)

    def ended(losses: Array) -> bool:
        last = _choose(losses, level, confidence, method, grid[: len(losses)])
        return last != len(losses) - 1

    live = live_losses(
        model,
        recipe,
        x,
        grid,
        risk,
        prompt=prompt,
        tokenizer=tokenizer,
        batch=batch,
        ended=ended,
        advance=advance,
    )
    threshold, contract = _settle(live.losses, grid, level, confidence, method, RISK_NAMES[risk], "prompt")
    calibration = Calibration.of(model, recipe, threshold, contract, data=list(x))
    return Calibrated(calibration, threshold, _of_candidates(live, candidates))


def calibrate_recorded(
    model: Any,
    recipe: Recipe,
    recording: Recording,
    candidates: Sequence[float],
    *,
    level: float,
    confidence: float | None = 0.95,
    method: str = "ltt",
    risk: str = "disagreement",
) -> Calibrated:
    """Find the loosest threshold whose risk is controlled, on what the exits of an encoder showed once.

    Parameters
    ----------
    model : transformers model
        Which was recorded.
    recipe : Recipe
        With a `Threshold` policy, whose value does not matter.
    recording : Recording
        Of examples that were not trained on, as :func:`exeunt.evaluation.record` makes it; not of tokens.
    candidates, level, confidence, method
        As for :func:`calibrate`.
    risk : {"disagreement", "error"}, default "disagreement"
        Another label than full depth gives, or than the right one (1 - accuracy; not for ``crc``, since full depth errs
        as well).

    Returns
    -------
    Calibrated

    Raises
    ------
    ValueError
        One sentence: too few examples, a recording of tokens, of another model or other exit heads, a risk that is not
        even kept without exits.

    Examples
    --------
    >>> import torch, exeunt
    >>> from exeunt.calibration.calibrating import calibrate_recorded
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=3, num_attention_heads=4))
    >>> z = torch.randn(200, 1, 2).expand(-1, 3, -1) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    >>> recording = exeunt.replay.Recording.of_logits(z)
    >>> found = calibrate_recorded(model, exeunt.recipes.right_tool(), recording, [0.9, 0.6], level=0.05)
    >>> found.threshold, found.calibration.contract.risk
    (0.6, 'label disagreement')
    """
    _check(candidates, method)
    if risk not in ("disagreement", "error"):
        raise ValueError(f"risk must be disagreement or error, got {risk!r}")
    rule = recipe.policy
    if not isinstance(rule, Threshold):
        raise ValueError(f"expected a recipe with a Threshold policy, got {rule}")
    if method == "crc":
        confidence = None
        if risk == "error":
            raise ValueError("method 'crc' needs losses that full depth does not have: expected risk disagreement")
        if rule.answers:
            raise ValueError(
                "method 'crc' needs losses that full depth does not have: expected a policy with fallback 'last', "
                f"got {rule.fallback!r}"
            )
    if recording.positions is not None:
        raise ValueError(
            "expected a recording of examples, got one of tokens, which are not drawn independently: use calibrate()"
        )
    heads = None if recipe.heads is None else fingerprints.of_heads(recipe.heads)
    for what, own in (("model", fingerprints.of_model(model)), ("heads", heads)):
        known = recording.about.get(what)
        if known is not None and known != own:
            other = "another model" if what == "model" else "other exit heads"
            raise ValueError(f"the recording belongs to {other}: expected {own}, got {known}")
    truth = recording.predicted[:, -1] if risk == "disagreement" else recording.labels
    if truth is None:
        raise ValueError("risk 'error' needs labels: expected a recording that has them, got none")
    recipe = dataclasses.replace(recipe, exits=recipe.exits or recording.exits)
    losses, layers, grid = [], [], _with_full_depth(candidates)
    for candidate in grid:
        policy = dataclasses.replace(rule, value=candidate)
        done = replay(recording, dataclasses.replace(recipe, policy=policy))
        losses.append(label_disagreement(done.label, truth))
        layers.append(done.mean_layers)
    live = Live(np.stack(losses), layers)
    name = "label disagreement" if risk == "disagreement" else "1 - accuracy"
    threshold, contract = _settle(live.losses, grid, level, confidence, method, name, "example")
    data = recording.about.get("data") or [recording.statistics.numpy().tobytes()]
    calibration = Calibration.of(model, recipe, threshold, contract, data=data)
    return Calibrated(calibration, threshold, _of_candidates(live, candidates))


def _check(candidates: Sequence[float], method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not len(candidates):
        raise ValueError("candidates must be one threshold or more, got none")


def _with_full_depth(candidates: Sequence[float]) -> Sequence[float]:
    """The candidates behind inf, which is what comes out where none of them passes.

    It is tested like them, since full depth can have losses too (against the truth; where the most confident exit
    answers), and first: a test in fixed sequence may fall back on what it has passed, and on nothing else.
    """
    return candidates if candidates[0] == math.inf else (math.inf, *candidates)


def _of_candidates(live: Live, candidates: Sequence[float]) -> Live:
    """What was found of the candidates that the caller named."""
    own = slice(0 if candidates[0] == math.inf else 1, None)
    return Live(live.losses[own], live.layers[own])


def _settle(
    losses: Array, grid: Sequence[float], level: float, confidence: float | None, method: str, risk: str, unit: str
) -> tuple[float, Contract]:
    """The threshold that the losses allow, and what it promises."""
    alone, n = float(losses[0].mean()), losses.shape[1]
    if method == "crc" and alone > 0:
        raise ValueError(f"method 'crc' needs losses that full depth does not have, got {alone:.3g} without any exit")
    row = _choose(losses, level, confidence, method, grid[: len(losses)])
    if row is None:
        raise ValueError(
            f"not even without any exit is {risk} shown to be at most {level:g}: it is {alone:.3g} on {n} {unit}s"
        )
    promised = "marginal" if confidence is None else confidence
    return float(grid[row]), Contract(risk, level, promised, n, NAMES[method], unit)  # type: ignore[arg-type]


def _choose(
    losses: Array, level: float, confidence: float | None, method: str, candidates: Sequence[float]
) -> int | None:
    if method == "crc":
        return risk_control(losses, level, "crc", candidates=candidates)
    if confidence is None:
        raise ValueError(f"method {method!r} needs a confidence between 0 and 1, got none")
    if method == "wsr":
        return risk_control(losses, level, "wsr", confidence=confidence, candidates=candidates)
    return learn_then_test(losses, level, confidence, candidates=candidates)
