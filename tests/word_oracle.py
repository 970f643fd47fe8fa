"""What exits of a tagger should do, computed the long way: every layer runs for every token, one row at a time.

Decisions are made word by word in plain Python. Halted tokens get their frozen state back after every layer.
"""

from __future__ import annotations

import functools
import math

import torch

from encoder_zoo import CLASSES
from exeunt.classifier_heads import ClassifierHeads, LinearHead, PoolerHead
from exeunt.models import discover_encoder, encoder_in


def word_pieces(pieces, longest=80):
    """A tokenizer of BERT's kind for these pieces, built alike by old and new transformers."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=longest,
    )  # fmt: skip


def tagger_heads(model, kind=LinearHead, seed=3, spread=2.5, classes=CLASSES):
    config = encoder_in(model).config
    torch.manual_seed(seed)
    heads = {e: kind(config.hidden_size, classes) for e in range(config.num_hidden_layers - 1)}
    with torch.no_grad():
        for head in heads.values():
            head.out.weight.normal_(std=spread / config.hidden_size**0.5)
    return ClassifierHeads(heads)


def random_words(lengths, seed=0, width=None):
    """A word map [B, S]: special tokens at both ends and now and then within, words of one to four pieces."""
    g = torch.Generator().manual_seed(seed)
    words = torch.zeros(len(lengths), width or int(max(lengths)), dtype=torch.int64)
    for row, length in enumerate(lengths):
        at, number = 1, 0
        while at < length - 1:
            if int(torch.randint(0, 9, (), generator=g)) == 0:
                at += 1
                continue
            number += 1
            size = min(int(torch.randint(1, 5, (), generator=g)), int(length) - 1 - at)
            words[row, at : at + size] = number
            at += size
    return words


def doubts(logits, name):
    """How uncertain each word is, larger is worse."""
    p = logits.double().softmax(-1)
    if name == "max_prob":
        return [-float(x) for x in p.amax(-1)]
    return [float(x) for x in torch.special.entr(p).sum(-1) / math.log(logits.shape[-1])]


class Row:
    """The words of one row: lists of their pieces, and which are neighbours."""

    def __init__(self, words):
        self.pieces, self.segments, before = [], [], 0
        for at, number in enumerate(words.tolist()):
            if number and number != before:
                self.pieces.append([])
                opens = not self.segments or before == 0
                self.segments.append((self.segments[-1] + 1 if self.segments else 0) if opens else self.segments[-1])
            if number:
                self.pieces[-1].append(at)
            before = number

    def __len__(self):
        return len(self.pieces)

    def window(self, j, size):
        near = range(max(0, j - size // 2), min(len(self), j + size // 2 + 1))
        return [k for k in near if self.segments[k] == self.segments[j]]


@functools.lru_cache(1)
def found_of(model):
    """The structure of a model, and the last norm of each of its layers."""
    structure = discover_encoder(model, tokens=True)
    last = ("output.LayerNorm", "output_layer_norm")
    return structure, [dict(layer.named_modules()).get(last[0], dict(layer.named_modules()).get(last[1]))
                       for layer in structure.layers]  # fmt: skip


@torch.no_grad()
def oracle(model, heads, ids, words, decide, *, norm="post", pieces="all", transitions=None, drop_keys=False):
    """Logits [S, C], the layer after which each token stopped, and the least distance of a score to its threshold.

    ``decide(layer, row, logits of words, halted)`` returns one bool a word and the distance to the nearest threshold.
    """
    structure, norms = found_of(model)
    last, length, row = len(structure.layers) - 1, len(ids), Row(words)
    state = {
        "frozen": torch.zeros(length, dtype=torch.bool), "depth": torch.full((length,), last), "logits": {},
        "over": False, "clear": math.inf, "halted": [False] * len(row), "label": [-1] * len(row), "kept": {},
    }  # fmt: skip
    undo, calls = [], iter(range(last + 1))

    def masked(z, j):
        if transitions is None:
            return z
        allowed = torch.ones(z.shape[-1], dtype=torch.bool)
        for k, table in ((j - 1, transitions), (j + 1, transitions.t())):
            if 0 <= k < len(row) and row.segments[k] == row.segments[j] and state["halted"][k]:
                allowed &= table[state["label"][k]]
        return z.masked_fill(~allowed, -math.inf) if allowed.any() else z

    def judge(layer, h):
        """After a layer, or what follows it: who halts."""
        if state["over"] or layer not in heads:
            return
        z = heads[layer].out(torch.tanh(heads[layer].pooler(h)) if isinstance(heads[layer], PoolerHead) else h)
        own = [masked(z[p[0]], j) for j, p in enumerate(row.pieces)]
        go, clear = decide(layer, row, torch.stack(own) if own else z[:0], state["halted"])
        state["clear"] = min(state["clear"], clear)
        new = [j for j in range(len(row)) if go[j] and not state["halted"][j]]
        stop = {t: masked(z[t], j) for j in new for t in (row.pieces[j] if pieces == "all" else row.pieces[j][:1])}
        if len(new) + sum(state["halted"]) == len(row):
            state["over"] = True
            inside = {t: j for j, p in enumerate(row.pieces) for t in p}
            for t in range(length):
                if not state["frozen"][t] and t not in stop:
                    stop[t] = masked(z[t], inside[t]) if t in inside else z[t]
        for j in new:
            state["label"][j] = int(own[j].argmax())
        for j in new:
            state["halted"][j] = True
        for t, logits in stop.items():
            state["frozen"][t], state["depth"][t], state["logits"][t] = True, layer, logits
            state["kept"][t] = state["before"][t] if norm == "pre" else h[t]

    def entered(module, args, kwargs):
        i = state["layer"] = next(calls)
        h = (args[0] if args else kwargs["hidden_states"])[0]
        if i:
            judge(i - 1, h)
        if drop_keys and i and state["frozen"].any():
            state["mask"] = state["frozen"]
        return None

    def left(module, args, kwargs, output):
        h = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        for t, kept in state["kept"].items():
            h[0, t] = state["norm"][state["layer"]](kept) if norm == "pre" else kept
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    def noted(module, args):
        if args[0].dim() == 3:  # not the oracle's own call
            state["before"] = args[0][0]

    if norm == "pre":
        state["norm"] = norms
        undo += [n.register_forward_pre_hook(noted) for n in norms]
    for layer in structure.layers:
        undo.append(layer.register_forward_pre_hook(entered, with_kwargs=True))
        undo.append(layer.register_forward_hook(left, with_kwargs=True))
    try:
        out = model(input_ids=ids[None]).logits[0].clone()
    finally:
        for handle in undo:
            handle.remove()
    for j, p in enumerate(row.pieces):
        for t in p:
            if t not in state["logits"]:
                out[t] = masked(out[t], j)
    for t, logits in state["logits"].items():
        out[t] = logits
    return out, state["depth"], state["clear"]


def window_rule(values, size, name="neg_normalized_entropy", own=None, settled=False):
    """TOKEE in Python; values are thresholds of the (negated) doubt, as in the policy."""

    def decide(layer, row, logits, halted):
        u = doubts(logits, name)
        counted = [-math.inf if settled and h else x for x, h in zip(u, halted, strict=True)]
        limit = -values[layer]
        worst = [max(counted[k] for k in row.window(j, size)) for j in range(len(row))]
        go = [w < limit or (own is not None and x < -own) for w, x in zip(worst, u, strict=True)]
        distances = [abs(w - limit) for w in worst if w > -math.inf]
        distances += [abs(x + own) for x in u] if own is not None else []
        return go, min(distances, default=math.inf)

    return decide


def sentence_rule(values, over, name="neg_normalized_entropy"):
    def decide(layer, row, logits, halted):
        u = doubts(logits, name)
        whole = (max(u) if over == "max" else sum(u) / len(u)) if u else math.inf
        return [whole < -values[layer]] * len(row), abs(whole + values[layer])

    return decide
