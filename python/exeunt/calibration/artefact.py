"""Calibrations on disk: thresholds, what they promise, and what they belong to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from exeunt import files
from exeunt.calibration import fingerprints
from exeunt.calibration.contract import Contract
from exeunt.policies import Threshold
from exeunt.recipes import Recipe

__all__ = ["Calibration"]

FORMAT = {"format": "exeunt.calibration", "version": 2}


@dataclass(frozen=True)
class Calibration:
    """Thresholds with their contract, and what it was made for; :meth:`of` makes one.

    Attributes
    ----------
    thresholds : dict of int to float
        Exit layer to threshold; inf never exits.
    contract : Contract
        What they promise.
    recipe : dict
        What else decides: exits, confidence with its temperatures, policy and its decay, state strategy.
    model : dict
        :func:`exeunt.calibration.fingerprints.of_model`.
    heads : str or None
        :func:`exeunt.calibration.fingerprints.of_heads`, None without any.
    data : str
        Digest of the calibration data.
    created : str
        Time in UTC, ISO 8601.

    Examples
    --------
    >>> import tempfile, exeunt
    >>> from pathlib import Path
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.calibration import Calibration, Contract
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> recipe = exeunt.recipes.calm(exits=[1, 2])
    >>> contract = Contract("token disagreement", 0.1, 0.95, 200, "learn_then_test, hoeffding_bentkus", "prompt")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "calibration.json"
    ...     Calibration.of(model, recipe, 0.83, contract, data=["first prompt", "second prompt"]).save(path)
    ...     with exeunt.attach(model, recipe, calibration=path) as early:
    ...         print(early.recipe.policy)
    Threshold(value=0.83, ...)
    """

    thresholds: dict[int, float]
    contract: Contract
    recipe: dict[str, Any]
    model: dict[str, int | str]
    heads: str | None
    data: str
    created: str

    @classmethod
    def of(
        cls,
        model: Any,
        recipe: Recipe,
        thresholds: float | Mapping[int, float] | Iterable[float],
        contract: Contract,
        data: Iterable[Any],
    ) -> Calibration:
        """Put a calibration together.

        Parameters
        ----------
        model : nn.Module
            The model.
        recipe : Recipe
            What was calibrated; its own threshold does not matter.
        thresholds : float, array or mapping
            One for all exits, one an exit, or by exit layer.
        contract : Contract
            What the thresholds promise.
        data : iterable
            Calibration units: texts, bytes or token ids.
        """
        exits = recipe.exits
        if exits is None:
            raise ValueError(
                "the recipe must name its exits, or be taken over a model's layers (Recipe.over), got none"
            )
        if isinstance(thresholds, Mapping):
            by_exit = {int(layer): float(value) for layer, value in thresholds.items()}
        elif isinstance(thresholds, Iterable):
            thresholds = [float(value) for value in thresholds]
            by_exit = dict(zip(exits, thresholds, strict=False)) if len(thresholds) == len(exits) else {}
        else:
            by_exit = dict.fromkeys(exits, float(thresholds))
        if tuple(sorted(by_exit)) != exits or any(math.isnan(value) for value in by_exit.values()):
            raise ValueError(f"thresholds must be a number for each exit of {list(exits)}, got {thresholds}")
        return cls(
            thresholds=by_exit,
            contract=contract,
            recipe=_described(recipe),
            model=fingerprints.of_model(model),
            heads=_digest(recipe),
            data=hashlib.sha256("".join(fingerprints.of_data(data)).encode()).hexdigest(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, completely or not at all; a threshold that never exits is null there."""
        fields = {name: getattr(self, name) for name in ("recipe", "model", "heads", "data", "created")}
        thresholds = {str(layer): None if value == math.inf else value for layer, value in self.thresholds.items()}
        contract = dataclasses.asdict(self.contract) | {"assumptions": self.contract.assumptions}
        content = {**FORMAT, "thresholds": thresholds, "contract": contract, **fields}
        files.write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file holds something else, or a part is missing.
        """
        try:
            content = json.loads(Path(path).read_bytes())
        except ValueError:
            content = None
        if not isinstance(content, dict) or any(content.get(name) != value for name, value in FORMAT.items()):
            raise ValueError(f"{path} is not an exeunt calibration of version {FORMAT['version']}")
        try:
            thresholds = content["thresholds"].items()
            contract = {name: value for name, value in content["contract"].items() if name != "assumptions"}
            rest = {name: content[name] for name in ("recipe", "model", "heads", "data", "created")}
            return cls(
                thresholds={int(layer): math.inf if value is None else float(value) for layer, value in thresholds},
                contract=Contract(**contract),
                **rest,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as damaged:
            raise ValueError(f"{path} is a damaged exeunt calibration: {damaged}") from damaged

    def apply(self, model: Any, recipe: Recipe) -> Recipe:
        """Return the recipe with the calibrated threshold in place of its own.

        Raises
        ------
        ValueError
            One sentence, if the contract was made for another model, other heads or another recipe.
        """
        for what, own, given in (
            ("model", self.model, fingerprints.of_model(model)),
            ("exit heads", {"digest": self.heads}, {"digest": _digest(recipe)}),
            ("recipe", self.recipe, _described(recipe)),
        ):
            differing = [name for name in own | given if own.get(name) != given.get(name)]
            if differing:
                fields = "; ".join(f"{name} {own.get(name)}, got {given.get(name)}" for name in differing)
                raise ValueError(f"the calibration belongs to another {what}: expected {fields}")
        measure, policy = recipe.confidence, recipe.policy
        if measure is None or not isinstance(policy, Threshold):
            raise ValueError(f"a calibration has thresholds: expected a Threshold policy, got {recipe.policy}")
        values = tuple(  # what no score reaches; what each does
            math.inf if value > measure.high else max(value, measure.low)
            for _, value in sorted(self.thresholds.items())
        )
        value = values[0] if len(set(values)) == 1 else values
        return dataclasses.replace(recipe, policy=dataclasses.replace(policy, value=value))


def _described(recipe: Recipe) -> dict[str, Any]:
    """Everything but threshold and heads, as JSON has it."""
    policy = recipe.policy
    decay = getattr(policy, "decay", None)
    described = {
        "exits": list(recipe.exits or ()),
        "confidence": recipe.measures,
        "policy": type(policy).__name__,
        "decay": None if decay is None else [decay.tau, decay.length],
        "state": type(recipe.state).__name__,
    }
    own = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy) if f.name not in ("value", "decay")}
    defaults = {f.name: f.default for f in dataclasses.fields(policy)}
    return described | {name: value for name, value in own.items() if value != defaults[name]}


def _digest(recipe: Recipe) -> str | None:
    return None if recipe.heads is None else fingerprints.of_heads(recipe.heads)
