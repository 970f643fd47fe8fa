"""What exits do not work with: refused at attach where a model says so, at the start of a generation where a call does.

docs/models.md has the table of what an option of ``generate`` loses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from transformers import DynamicCache, EncoderDecoderCache

from exeunt import cache as caches
from exeunt.models import ATTENTION, own_cache, register_attention

if TYPE_CHECKING:
    from exeunt.generation import GenerationState

__all__ = ["adopted", "check_model", "default_cache", "full_depth"]

VERSIONS = ((4, 57), (6, 0))  # from, and up to but without


def check_model(model: Any) -> None:
    """Raise for a version of transformers, or settings of a model, that would fail in the middle of a generation.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.limits import check_model
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> check_model(model)
    >>> model.generation_config.cache_implementation = "static"
    >>> check_model(model)
    Traceback (most recent call last):
        ...
    ValueError: attach: exits need the default DynamicCache, got generation_config.cache_implementation='static'
    """
    if not VERSIONS[0] <= tuple(map(int, transformers.__version__.split(".")[:2])) < VERSIONS[1]:
        raise ImportError(f"attach needs transformers>=4.57,<6, got {transformers.__version__}")
    register_attention()
    config, settings = getattr(model, "config", None), getattr(model, "generation_config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and attention not in ATTENTION:
        raise ValueError(f"attach: expected {' or '.join(ATTENTION)} attention, got {attention!r}")
    kind = getattr(settings, "cache_implementation", None)
    if kind is not None and "dynamic" not in kind and kind != "hybrid":  # what Gemma's checkpoints call the default
        raise ValueError(
            f"attach: exits need the default DynamicCache, got generation_config.cache_implementation={kind!r}"
        )


def full_depth(mode: str, config: Any) -> str | None:
    """What keeps a generation of this mode and configuration at full depth, if anything does.

    ValueError for a draft by the model's own first layers: it fails, and leaves the model's configuration changed.

    Examples
    --------
    >>> from transformers import GenerationConfig
    >>> from exeunt.limits import full_depth
    >>> full_depth("greedy_search", GenerationConfig(output_attentions=True, return_dict_in_generate=True))
    'output_attentions'
    >>> full_depth("assisted_generation", GenerationConfig())
    'assisted generation'
    """
    if getattr(config, "assistant_early_exit", None) is not None:
        raise ValueError(
            f"attach: expected no assistant_early_exit={config.assistant_early_exit}, whose drafts fill a cache of the "
            "first layers alone: leave it out, or detach"
        )
    if mode in ("assisted_generation", "contrastive_search", "dola_generation"):
        return mode.replace("_", " ")
    if config.output_attentions:
        return "output_attentions"
    return "use_cache=False" if config.use_cache is False else None


def default_cache(model: Any) -> Any:
    """The cache that a model makes for itself.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.limits import default_cache
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> type(default_cache(model)).__name__
    'DynamicCache'
    """
    config = model.config.get_text_config(decoder=True)
    own = DynamicCache(config=config)
    return EncoderDecoderCache(own, DynamicCache(config=config)) if model.config.is_encoder_decoder else own


def adopted(cache: Any, depth: int) -> GenerationState:
    """The state of the generation that a cache belongs to; ValueError for a kind of cache that exits cannot use.

    Examples
    --------
    >>> from transformers import DynamicCache
    >>> from exeunt.limits import adopted
    >>> cache = DynamicCache()
    >>> state = adopted(cache, depth=4)
    >>> len(cache.layers), state is adopted(cache, depth=4)
    (4, True)
    """
    own = own_cache(cache)
    state = caches.adopt(own, depth)
    if state is None:
        kind = type(own).__name__ + (" with offloading" if getattr(own, "offloading", False) else "")
        raise ValueError(
            f"attach: exits need the default DynamicCache, got {kind}: leave out cache_implementation, or detach"
        )
    return state
