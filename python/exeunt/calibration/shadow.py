"""Shadow runs: a share of the requests also runs at full depth, and the audit of the contract hears of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import GenerationMode

from exeunt.calibration._checks import Array
from exeunt.calibration.audit import Audit
from exeunt.calibration.calibrating import RISK_NAMES
from exeunt.calibration.live import Forced, compared, until_end
from exeunt.calibration.risks import token_disagreement
from exeunt.decoder import Attached

__all__ = ["RISKS", "Shadow"]

RISKS = {name: risk for risk, name in RISK_NAMES.items()}  # of contracts


class Shadow:
    """Greedy generation with exits, a share of which is held against full depth.

    Which requests are looked at is drawn before they run and does not depend on what they hold. The shadow runs after
    the request, whose output it does not touch; with ``Audit(..., on_violation="full_depth")`` a refuted contract makes
    later requests run at full depth, and these are not looked at any more.

    What is compared follows from the contract's risk: for "next-token disagreement" the model alone decodes the
    finished text once more, and what it would have said is held against what was said, but for the first token, which
    comes from the prompt's own forward (a request of one token shows nothing and is not looked at); for the risks of
    generated text it generates as well. Both sides have the same options, penalties and ends.

    Parameters
    ----------
    early : Attached
        The model with its exits.
    audit : Audit
        Of the contract in question.
    fraction : float, default 0.05
        Share of the requests (rows of a batch) that are looked at, from 0 to 1.
    tokenizer : transformers tokenizer, optional
        For risks that compare words.
    seed : int, default 0
        Of the draw.

    Attributes
    ----------
    requests : int
        Rows generated.

    Raises
    ------
    ValueError
        At a fraction outside 0..1, or a contract of a risk that generations do not have.

    Examples
    --------
    >>> import torch, exeunt
    >>> from exeunt.calibration import Audit, Contract
    >>> from exeunt.calibration.shadow import Shadow
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, eos_token_id=None,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> contract = Contract("next-token disagreement", 0.1, 0.95, 200, "learn_then_test, binomial", "prompt")
    >>> audit = Audit(contract)
    >>> with exeunt.attach(model, exeunt.recipes.calm([1], float("inf"))) as early:
    ...     out = Shadow(early, audit, fraction=1.0).generate(torch.tensor([[3, 5], [7, 9]]), max_new_tokens=4)
    >>> audit.count, audit.total
    (2, 0.0)
    """

    def __init__(
        self, early: Attached, audit: Audit, *, fraction: float = 0.05, tokenizer: Any = None, seed: int = 0
    ) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in 0..1, got {fraction}")
        if audit.contract.risk not in RISKS:
            raise ValueError(f"expected a contract of {', '.join(RISKS)}, got {audit.contract.risk!r}")
        self.risk = RISKS[audit.contract.risk]
        if self.risk in ("rouge-l", "bleu") and tokenizer is None:
            raise ValueError(f"risk {self.risk!r} compares words: expected a tokenizer, got none")
        self.early, self.audit, self.fraction, self.tokenizer = early, audit, fraction, tokenizer
        self.requests = 0
        self._draws = np.random.default_rng(seed)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Generate as ``model.generate`` does, greedily.

        Parameters
        ----------
        input_ids : Tensor
            [B, S] prompts.
        **options
            As ``model.generate`` takes them; ``attention_mask`` for prompts of different lengths. With those of the
            model's ``generation_config`` they must come to greedy search.

        Returns
        -------
        Tensor
            [B, S + n] ids.

        Raises
        ------
        ValueError
            At any other search than a greedy one, or an output that is not ids.
        """
        model = self.early.model
        own = {name: value for name, value in options.items() if name != "generation_config"}
        config, _ = model._prepare_generation_config(options.get("generation_config"), **own)  # as generate does
        mode = config.get_generation_mode(options.get("assistant_model"))
        if mode != GenerationMode.GREEDY_SEARCH or config.return_dict_in_generate:
            got = "a dict" if config.return_dict_in_generate else mode.value.replace("_", " ")
            raise ValueError(f"shadow runs compare greedy generations that return ids, got {got}")
        options = {"attention_mask": torch.ones_like(input_ids)} | options
        self.requests += len(input_ids)
        if not self.audit.exits_allowed:
            with self.early.paused():
                return model.generate(input_ids, **options)
        chosen = torch.from_numpy(self._draws.random(len(input_ids)) < self.fraction)
        out: Tensor = model.generate(input_ids, **options)
        if chosen.any():
            again = options | {"attention_mask": options["attention_mask"][chosen], "streamer": None}
            losses = self._losses(input_ids[chosen], out[chosen], again, config.eos_token_id)
            self.audit.observe(losses)
        return out

    def _losses(self, prompts: Tensor, said: Tensor, options: dict[str, Any], ends: int | list[int] | None) -> Array:
        """Losses of the requests that have any: of what was said, against what full depth says."""
        model, start = self.early.model, prompts.shape[1]
        early = until_end(said[:, start:], ends)
        with self.early.paused():
            if self.risk != "next-token":
                full = until_end(model.generate(prompts, **options)[:, start:], ends)
                return compared(self.risk, early, full, self.tokenizer)
            force = Forced(said)
            processors = [*(options.get("logits_processor") or ()), force]
            model.generate(prompts, **options | {"logits_processor": processors})
        alone = torch.stack(force.words, 1).tolist()
        pairs = [(own[1:], words[1 : len(own)]) for own, words in zip(early, alone, strict=True) if len(own) > 1]
        return token_disagreement(*zip(*pairs, strict=True)) if pairs else np.empty(0)
