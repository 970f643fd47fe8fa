"""What is known of stock models by name: only facts that discovery cannot find by running a model."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

__all__ = ["ATTENTION", "CACHE_KEYWORD", "CACHE_KEYWORDS", "KEY_WISE", "LOGIT_BIAS", "LOGIT_SCALES", "SOFTCAP"]


def _cache_keyword() -> str:
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:  # the ops do without
        return "cache"
    return "cache" if tuple(map(int, version.split(".")[:2])) >= (5, 24) else "past_key_values"


#: How models and ``generate`` call their cache; whatever a layer calls it, in exeunt it is this too.
CACHE_KEYWORD = _cache_keyword()

#: How a decoder layer calls its cache.
CACHE_KEYWORDS = {"cache", "past_key_values", "past_key_value", "layer_past"}

#: Arguments of a decoder layer whose last dimension is the keys that it attends to.
KEY_WISE = ("attention_mask", "position_bias", "alibi")

#: Configuration fields that say by what the head's output is multiplied, exactly (Cohere, Granite).
LOGIT_SCALES: dict[str, Callable[[float], float]] = {"logit_scale": float, "logits_scaling": lambda s: 1.0 / s}

#: Configuration field of the bound that tanh puts on the logits (Gemma 2).
SOFTCAP = "final_logit_softcapping"

#: The buffer that is added to the head's output (BART, Marian).
LOGIT_BIAS = "final_logits_bias"

#: Attention implementations whose arguments can be picked by rows.
ATTENTION = ("eager", "sdpa", "exeunt")
