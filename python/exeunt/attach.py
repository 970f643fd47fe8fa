"""The plug: puts a recipe on a stock model and takes it off again."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from exeunt.calibration import Calibration
from exeunt.decoder import Attached
from exeunt.encoder import AttachedEncoder
from exeunt.models import encoder_in
from exeunt.policies import WordPolicy
from exeunt.recipes import Recipe
from exeunt.token_encoder import AttachedTagger

__all__ = ["Attached", "attach"]


def attach(
    model: Any,
    recipe: Recipe,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    buckets: bool = True,
) -> Any:
    """Let tokens of a stock decoder (an encoder-decoder's too), or texts of an encoder, leave early.

    Encoders (BERT and its kind; :mod:`exeunt.encoder`): the recipe brings ``ClassifierHeads``; a text of a batch leaves
    on its own, and the model returns what it always returns, in the same order.

    Language models: ``model.generate`` (greedy, sampling, beams, streamers, processors) works as before; every row of a
    batch leaves on its own. Prompts, forwards of several tokens and assisted decoding run at full depth.

    While nothing leaves, the output is bit-identical to the unattached model.

    Parameters
    ----------
    model : nn.Module
        A transformers model that generates text; ``docs/models.md`` lists families and versions that are tested, others
        work if discovery finds their parts. Or an encoder (bare, or with a classification or regression head), or a
        module of your own around an encoder.
    recipe : Recipe
        For example ``exeunt.recipes.calm(exits=[8, 12], threshold=0.9)``.
    calibration : Calibration or path, optional
        Its threshold takes the place of the recipe's; everything else has to be as it was calibrated.
    buckets : bool, default True
        Encoders: rows of similar length run together once some have left, and padding is not computed.

    Returns
    -------
    Attached or AttachedEncoder
        A context manager; leaving it (or ``detach()``) restores the model.

    Raises
    ------
    ValueError
        One sentence: a model without decoder layers or whose parts work in another way, attention or a cache that exits
        cannot use, exits outside 0..L-2, heads of another width or dtype, a model that has exits already, a
        calibration of another model, other heads or another recipe.
    TypeError
        For something else than a module, or than a recipe.
    ImportError
        Without transformers, or with a version of it that is not supported.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)).eval()
    >>> with exeunt.attach(model, exeunt.recipes.calm(exits=[1], threshold=0.0)) as early:
    ...     out = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=4, do_sample=False)
    >>> early.report().histogram   # the first of the four tokens comes from the prompt's own forward
    {1: 3}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: expected a model, an nn.Module, got {model!r}")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"attach: expected a Recipe like exeunt.recipes.calm([8], 0.9), got {recipe!r}")
    if encoder_in(model) is not None:
        if isinstance(recipe.policy, WordPolicy):
            return AttachedTagger(model, recipe, calibration)
        return AttachedEncoder(model, recipe, calibration, buckets=buckets)
    return Attached(model, recipe, calibration)
