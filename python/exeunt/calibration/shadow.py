"""Shadow runs: a share of the requests also runs at full depth, and the audit of the contract hears of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration._checks import Array
from exeunt.calibration.audit import Audit
from exeunt.calibration.calibrating import RISK_NAMES
from exeunt.calibration.live import compared, until_end
from exeunt.decoder import Attached

__all__ = ["RISKS", "Shadow"]

RISKS = {name: risk for risk, name in RISK_NAMES.items()}  # of contracts


class Shadow:
    """Greedy generation with exits, a share of which is held against full depth.

    Which requests are looked at is drawn before they run and does not depend on what they hold. The shadow runs after
    the request, whose output it does not touch; with ``Audit(..., on_violation="full_depth")`` a refuted contract makes
    later requests run at full depth, and these are not looked at any more.

    What is compared follows from the contract's risk: for "next-token disagreement" one forward of the model alone
    over the finished text says what full depth would have said after each of its tokens; for the risks of generated
    text it generates as well.

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
            As ``model.generate`` takes them; ``attention_mask`` for prompts of different lengths.

        Returns
        -------
        Tensor
            [B, S + n] ids.
        """
        model = self.early.model
        sampled = options.get("do_sample", model.generation_config.do_sample)
        if sampled or options.get("num_beams", 1) != 1 or options.get("return_dict_in_generate"):
            raise ValueError("shadow runs compare greedy generations that return ids, got other options")
        options = {"do_sample": False, "attention_mask": torch.ones_like(input_ids)} | options
        self.requests += len(input_ids)
        if not self.audit.exits_allowed:
            with self.early.paused():
                return model.generate(input_ids, **options)
        chosen = torch.from_numpy(self._draws.random(len(input_ids)) < self.fraction)
        out: Tensor = model.generate(input_ids, **options)
        if chosen.any():
            self.audit.observe(self._losses(input_ids[chosen], out[chosen], options, chosen))
        return out

    def _losses(self, prompts: Tensor, said: Tensor, options: dict[str, Any], chosen: Tensor) -> Array:
        model, start = self.early.model, prompts.shape[1]
        mask = options["attention_mask"][chosen]
        ends = model.generation_config.eos_token_id
        early = until_end(said[:, start:], ends)
        with self.early.paused():
            if self.risk == "next-token":
                mask = torch.cat((mask, torch.ones_like(said[:, start:])), 1)
                places = (mask.cumsum(1) - 1).clamp(min=0)  # of prompts padded on the left
                logits = model(said, attention_mask=mask, position_ids=places, use_cache=False).logits
                alone = logits[:, start - 1 : -1].argmax(-1).tolist()
                full = [row[: len(own)] for row, own in zip(alone, early, strict=True)]
            else:
                again = model.generate(prompts, **options | {"attention_mask": mask})
                full = until_end(again[:, start:], ends)
        return compared(self.risk, early, full, self.tokenizer)
