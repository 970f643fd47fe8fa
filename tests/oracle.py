"""What early exit means, the slow way: run every layer for every row and throw away what rows that left got.

Written without exeunt's attach, states and kernels (it uses the torch reference): the yardstick for attach.
"""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from exeunt import reference
from exeunt.models import CACHE_KEYWORD


def tiny_llama(layers=6, vocab=203, seed=0, sharpen=3.0, **config):
    """A random Llama whose logits are spread enough for its confidences to differ."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpen)
    return model


def prompts(batch=4, length=9, seed=1, vocab=203):
    """Random prompts; the second row is padded on the left."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, length), generator=g)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :3] = 0
        ids[1, :3] = 0
    return dict(input_ids=ids, attention_mask=mask)


def score_of(name, hidden, previous, model, head=None):
    """A confidence measure written out in torch."""
    if name == "saturation":
        return torch.cosine_similarity(hidden, previous, dim=-1)
    if name == "probe":
        return head.probe(hidden)
    p = exit_logits(hidden, model, head).double().softmax(-1)
    top = p.topk(2, -1).values
    return {
        "max_prob": top[:, 0],
        "margin": top[:, 0] - top[:, 1],
        "neg_entropy": (p * p.log()).nan_to_num(0.0).sum(-1),
    }[name]


def exit_logits(hidden, model, head=None):
    state = hidden if head is None else head.state(hidden)
    norm = model.model.norm
    out = torch.empty(len(state), model.lm_head.weight.shape[0])
    reference.exit_stats(
        state, model.lm_head.weight, norm="rms", norm_weight=norm.weight, eps=norm.variance_epsilon, logits_out=out
    )
    return out


class Oracle:
    """Greedy decoding in which a row's state freezes at its exit while all layers go on running.

    ``thresholds(t)`` gives the threshold of the t-th new token. Afterwards ``tokens`` [B, T], ``depths`` [T-1][B] and
    ``closest``, the smallest distance of any score that was looked at from its threshold.
    """

    def __init__(self, model, exits, confidence, thresholds, heads=None):
        self.model, self.exits, self.confidence, self.heads = model, exits, confidence, heads
        self.thresholds = thresholds if callable(thresholds) else lambda t: thresholds
        self.closest = float("inf")

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, new_tokens):
        model, decoder = self.model, self.model.model
        layers = list(decoder.layers)
        position = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position, use_cache=True)
        cache, tokens, self.depths, self.logits = out.past_key_values, [out.logits[:, -1].argmax(-1)], [], []
        for t in range(1, new_tokens):
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), 1)], 1)
            position = attention_mask.long().cumsum(-1)[:, -1:] - 1
            depth = torch.full((len(input_ids),), len(layers) - 1)
            kept = {}

            def patched(i, layer, depth=depth, kept=kept, t=t):
                def forward(hidden, *args, **kwargs):
                    new = type(layer).forward(layer, hidden, *args, **kwargs)
                    left = depth < i
                    new = torch.where(left[:, None, None], hidden, new)
                    if i in self.exits:
                        head = self.heads[i] if self.heads is not None else None
                        score = score_of(self.confidence, new[:, 0], hidden[:, 0], model, head)
                        threshold = self.thresholds(t)
                        self.closest = min([self.closest, *(score[~left] - threshold).abs().tolist()])
                        go = ~left & (score >= threshold)
                        for row in go.nonzero().flatten().tolist():
                            depth[row] = i
                            kept[row] = exit_logits(new[row], model, head)[0]
                    return new

                return forward

            for i, layer in enumerate(layers):
                layer.forward = patched(i, layer)
            try:
                out = model(
                    input_ids=tokens[-1][:, None], attention_mask=attention_mask, position_ids=position,
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
            finally:
                for layer in layers:
                    del layer.forward
            logits = out.logits[:, -1].clone()
            for row, own in kept.items():
                logits[row] = own
            tokens.append(logits.argmax(-1))
            self.depths.append(depth)
            self.logits.append(logits)
        self.tokens = torch.stack(tokens, 1)
        return self.tokens


class RunEverything:
    """The oracle for a model that somebody else drives (stock generate, a loop): it computes all rows everywhere.

    While the context is open, each row of a single-token forward on a filled cache leaves at its exit; the cache stays
    transformers' own. ``depths`` collects one [B] tensor a step. ``skipped`` says what the layers after the exit get of
    a row: "exit state", what it would be without exits ("full"), or nothing that a later token can see ("nothing").
    """

    GONE = 12345.0  # a key that nobody may see; it stands in the cache, so whatever happens to that happens to it

    def __init__(self, model, exits, confidence, threshold, skipped="exit state"):
        self.model, self.exits, self.confidence, self.threshold = model, exits, confidence, threshold
        self.skipped = skipped
        self.depths, self.closest, self.depth = [], float("inf"), None

    def __enter__(self):
        for i, layer in enumerate(self.model.model.layers):
            layer.forward = functools.partial(self.layer, i, layer)
        self.model.lm_head.forward = self.head
        return self

    def __exit__(self, *exc):
        for module in (*self.model.model.layers, self.model.lm_head):
            del module.forward

    def layer(self, i, layer, hidden, *args, **kwargs):
        if i == 0:
            decoding = hidden.shape[1] == 1 and kwargs[CACHE_KEYWORD].get_seq_length() > 0
            last = len(self.model.model.layers) - 1
            self.depth, self.kept = (torch.full((len(hidden),), last), {}) if decoding else (None, {})
        if self.skipped == "nothing":
            kwargs = self.without_gone(kwargs, i, hidden.shape[1])
        new = type(layer).forward(layer, hidden, *args, **kwargs)
        if self.depth is None:
            return new
        left = self.depth < i
        if self.skipped == "nothing":
            kwargs[CACHE_KEYWORD].layers[i].keys[left, :, -1] = self.GONE
        if self.skipped != "full":
            new = torch.where(left[:, None, None], hidden, new)
        if i in self.exits:
            score = score_of(self.confidence, new[:, 0], hidden[:, 0], self.model)
            self.closest = min([self.closest, *(score[~left] - self.threshold).abs().tolist()])
            for row in (~left & (score >= self.threshold)).nonzero().flatten().tolist():
                self.depth[row] = i
                self.kept[row] = exit_logits(new[row], self.model)[0]
        return new

    def without_gone(self, kwargs, i, new):
        """Arguments of a layer that is to see no key that stands for nothing."""
        layer = kwargs[CACHE_KEYWORD].layers[i] if i < len(kwargs[CACHE_KEYWORD].layers) else None
        if layer is None or not layer.get_seq_length():
            return kwargs
        gone = torch.nn.functional.pad((layer.keys[:, 0, :, 0] == self.GONE), (0, new))[:, None, None]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(1, 1, new, gone.shape[-1], dtype=torch.bool).tril(gone.shape[-1] - new)
        return {**kwargs, "attention_mask": mask & ~gone}

    def head(self, normed):
        logits = type(self.model.lm_head).forward(self.model.lm_head, normed)
        if self.depth is not None:
            for row, own in self.kept.items():
                logits[row, 0] = own
            self.depths.append(self.depth)
        return logits
