"""The small language model that comes with exeunt: 12 layers, 9.8 million parameters, trained so that it can exit.

``examples/train_small_lm.py`` made it, from Python's documentation, Jane Austen's novels and WordNet's definitions. It
goes on with a text in their manner and knows nothing else: what it shows is how tokens leave.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["EXITS", "FOLDER", "THRESHOLD", "load", "training"]

FOLDER = Path(__file__).with_name("data") / "small-lm"
EXITS = (3,)  # 0-based: after 4 of 12 layers, where one check pays best
THRESHOLD = 0.08  # of the margin


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the small language model and its tokenizer out of the package.

    Parameters
    ----------
    dtype : torch.dtype, default torch.float32
        Of the model's parameters, which are stored in bfloat16.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        In evaluation mode: 12 layers, hidden size 256, vocabulary 4096, tied embeddings.
    tokenizer : transformers.PreTrainedTokenizerFast
        Padding on the left; its chat template adds nothing, since the model only goes on.

    Raises
    ------
    ImportError
        Without transformers.

    Examples
    --------
    >>> import exeunt
    >>> from exeunt import small_lm
    >>> model, tokenizer = small_lm.load()
    >>> inputs = tokenizer("Return the number of", return_tensors="pt")
    >>> with exeunt.attach(model, exeunt.recipes.calm(small_lm.EXITS, small_lm.THRESHOLD, lazy=True)) as early:
    ...     out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    >>> early.report().layers
    12
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as missing:
        raise ImportError("the small language model needs transformers: pip install exeunt[hf]") from missing
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model, AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


def training() -> dict[str, Any]:
    """How the model was trained: runs, objectives, texts and their licences, measures on held-out text.

    Examples
    --------
    >>> from exeunt import small_lm
    >>> sorted(small_lm.training())
    ['held_out', 'runs', 'sketch', 'text']
    """
    return dict(json.loads((FOLDER / "training.json").read_text()))
