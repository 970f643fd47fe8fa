"""The plug for taggers: words of a batch halt between layers, each on its own, and stay visible to the others.

What is replaced, on instances only: ``forward`` of each encoder layer, of the module that makes the logits, of the
encoder around its own, where the mask of the batch is noted and tokens are counted, and of the model, which takes the
argument ``words`` (a word map, :mod:`exeunt.words`).

One forward, seen from above::

    layer 0 .. e   all tokens      stock forward, unchanged arguments, until the first word halts
    exit e         all words       exit head -> score -> policy; words that halt keep their state and their logits
    layer e+1 ..   active tokens   queries, attention over all tokens of their row, output projection, feed-forward
                   halted tokens   keys and values, from their frozen state
    last layer     all tokens      back in their places
    logits         active tokens   the model's own; tokens that halted return those of their exit head

A row ends once all of its words have halted; what is left of it, special tokens and pieces that went on, answers with
the exit at which it ends.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exeunt.calibration import Calibration
from exeunt.classifier_heads import LinearHead, PoolerHead, View
from exeunt.confidence import ExitPoint
from exeunt.encoder import AttachedEncoder
from exeunt.models.encoder_structure import EncoderStructure, discover_encoder, named, parameters_of
from exeunt.models.token_layers import token_layers
from exeunt.policies import WordPolicy
from exeunt.recipes import Recipe
from exeunt.states import Freeze
from exeunt.stats import ExitStats
from exeunt.token_batch import TokenForward
from exeunt.token_report import TokenReport

__all__ = ["AttachedTagger"]


class _UnderWay(threading.local):
    """What a thread is in the middle of; a forward stays on its thread."""

    words: Tensor | None = None
    running: Any = None
    ended: Any = None  # whose logits are still to come
    depths: Tensor | None = None


class AttachedTagger(AttachedEncoder):
    """Exits on a tagger: made by :func:`exeunt.attach`, undone by :meth:`detach` or by leaving the ``with`` block.

    The model is called as ever, with one argument more: ``model(**inputs, words=word_map(encoding))``.

    Attributes
    ----------
    model : nn.Module
        The model.
    recipe : Recipe
        What decides: one with a policy over words.
    structure : EncoderStructure
        What was found of the model.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import BertConfig, BertForTokenClassification
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> model = BertForTokenClassification(BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
    ...     num_hidden_layers=4, num_attention_heads=2, num_labels=3)).eval()
    >>> recipe = exeunt.recipes.tokee(1.0, heads=ClassifierHeads({e: LinearHead(16, 3) for e in range(3)}))
    >>> with torch.no_grad(), exeunt.attach(model, recipe) as early:
    ...     out = model(torch.tensor([[1, 8, 9, 2]]), words=torch.tensor([[0, 1, 2, 0]]))
    >>> early.depths, early.report().words
    (tensor([[0, 0, 0, 0]]), 2)
    """

    _report: Any

    def __init__(
        self, model: Any, recipe: Recipe, calibration: Calibration | str | os.PathLike[str] | None = None
    ) -> None:
        if calibration is not None:
            raise ValueError("attach: expected no calibration for a policy over words, whose thresholds are no row's")
        super().__init__(model, recipe)

    def report(self) -> Any:
        """Everything counted since attach or :meth:`reset_report`: a :class:`exeunt.token_report.TokenReport`."""
        return self._report

    def reset_report(self) -> None:
        """Start counting anew."""
        self._report = TokenReport(layers=self.depth)

    @property
    def depths(self) -> Tensor | None:
        """[B, S] int64 of this thread's last forward: the layer after which each token stopped; -1 for padding."""
        return self._local.depths

    # ---- putting it on

    def _discover(self, model: Any) -> EncoderStructure:
        structure = discover_encoder(model, tokens=True)
        if structure.output is None:
            raise ValueError(
                f"attach: expected a tagger, a model with logits for every token, got a bare {type(model).__name__}"
            )
        return structure

    def _check_recipe(self) -> None:
        super()._check_recipe()
        policy, measure, s = self.recipe.policy, self.recipe.confidence, self.structure
        assert isinstance(policy, WordPolicy)
        self._policy = policy
        for e in self._exits:
            head = self._heads[e]
            if not isinstance(head, (LinearHead, PoolerHead)) or head.pooling != "first" or head.meta is not None:
                raise ValueError(
                    "attach: expected heads that read one word, LinearHead or PoolerHead with pooling 'first', "
                    f"got {type(head).__name__} with pooling {head.pooling!r} at exit {e}"
                )
        if measure is None or not measure.reads_head:
            got = "none" if measure is None else measure.name
            raise ValueError(f"attach: words are judged by a measure of their logits, got {got}")
        t = policy.transitions
        if t is not None and len(t) != s.classes:
            raise ValueError(f"attach: expected transitions between {s.classes} labels like the model, got {len(t)}")
        self._layers = token_layers(s)
        state = self.recipe.state
        self._before = isinstance(state, Freeze) and state.norm == "pre" and self._layers[0].norm is not None
        for e in self._exits if self._before else ():
            if e in s.apart:
                raise ValueError(
                    f"attach: the state before a norm is not what follows layer {e}, behind which the model does more: "
                    "use Freeze('post') or a later exit"
                )

    def _install(self) -> None:
        self._local: Any = _UnderWay()
        super()._install()
        self._set(self.model, "forward", types.MethodType(self._model(self.model), self.model))
        for layer in self._layers if self._before else ():
            self._set(layer.norm, "forward", types.MethodType(self._norm(layer.norm), layer.norm))

    # ---- a forward of the model

    def _model(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of the model."""
        stock, local = module.forward, self._local

        @functools.wraps(type(module).forward)
        def forward(this: Any, *args: Any, words: Tensor | None = None, **kwargs: Any) -> Any:
            if this is not module:  # a copy of the model: it runs as if nothing were attached
                return type(this).forward(this, *args, **kwargs)
            local.words = words
            return stock(*args, **kwargs)

        return forward

    def _norm(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of the last norm of a layer: what it reads is what freezes."""
        stock, local = module.forward, self._local

        @functools.wraps(type(module).forward)
        def forward(this: Any, hidden: Tensor) -> Tensor:
            if this is not module:
                return type(this).forward(this, hidden)
            run = local.running
            if run is not None and run.whole:
                run.before = hidden
            return stock(hidden)

        return forward

    def _begin(self, ids: Tensor | None, given: dict[str, Any]) -> None:
        """Before the encoder: refuse what exits cannot serve, and note the mask and the words."""
        super()._begin(ids, given)
        local = self._local
        words, local.words = local.words, None
        if local.running is None:
            return
        local.running = None
        texts = given.get("inputs_embeds") if ids is None else ids
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attach: expected attention_mask [B, S], got {list(mask.shape)}")
        if given.get("head_mask") is not None:
            raise ValueError("attach: expected a forward without head_mask, which layers in parts do not take")
        if words is None:
            raise ValueError(
                "attach: expected words=..., the words that tokens belong to, got none: "
                "model(**inputs, words=exeunt.words.word_map(inputs))"
            )
        assert texts is not None
        if not isinstance(words, Tensor) or words.is_floating_point() or words.shape != texts.shape[:2]:
            got = f"{list(words.shape)} {words.dtype}" if isinstance(words, Tensor) else type(words).__name__
            raise ValueError(
                f"attach: expected words that cover the text, integers {list(texts.shape[:2])} like the ids, got {got}"
            )
        local.running = TokenForward(words.to(texts.device), mask, self.depth)

    def _layer(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of an encoder layer."""
        stock, local, last, names = module.forward, self._local, self.depth - 1, parameters_of(module)

        @functools.wraps(type(module).forward)  # by whose parameters exits on a copy name what it is called with
        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not module:  # a deep copy of the model: it runs as if nothing were attached
                return type(this).forward(this, *args, **kwargs)
            run: TokenForward | None = local.running
            if run is None:
                return stock(*args, **kwargs)
            i, run.next = run.next, run.next + 1
            hidden = args[0] if args else kwargs[names[0]]
            if i:
                self._judge(i - 1, run, hidden)
            if run.whole:
                out = stock(*args, **kwargs)
                run.returned = len(out) if isinstance(out, tuple) else 0
                run.layer_tokens += run.size[0] * run.size[1]
                return out
            if run.runs:
                with torch.no_grad():
                    run.run(self._layers[i], named(names, args, kwargs)[1])
            out = run.gathered() if i == last else hidden
            return (out, *[None] * (run.returned - 1)) if run.returned else out

        return forward

    # ---- exits and logits

    @torch.no_grad()
    def _judge(self, layer: int, run: Any, hidden: Tensor) -> None:
        """After a layer: let the exit head look at all words of the rows that run, and those halt that may."""
        if layer not in self._exits or not run.runs:
            return
        at, _ = self._exits[layer]
        if not self._policy.looks(at):
            return
        head, words = self._heads[layer], run.words
        flat = run.flat(hidden) if run.whole else run.hidden
        judged = head.judge(View(flat[:, None], None, layer, {}))
        logits, stats = judged.logits, judged.stats
        if self._policy.transitions is not None:
            logits = self._ruled(logits, run)
            own = logits[words.first]
            stats = ExitStats.from_logits(own.float())
        else:
            own = logits[words.first]
            stats = ExitStats(*(None if t is None else t[words.first] for t in stats))  # type: ignore[arg-type]
        if run.state is None:
            run.state = self.recipe.start(len(words), flat.device, head.classes)
        run.state.update(row=words.row, segment=words.segment, halted=run.halted)
        leave, _ = self.recipe.look(run.state, ExitPoint(own, own, head, stats, head.classes, own), at)
        run.checks += len(words)
        run.halt(leave & ~run.halted, logits, stats.argmax, layer, flat, self._policy.pieces)

    def _ruled(self, logits: Tensor, run: TokenForward) -> Tensor:
        """Logits [T, C] without the labels that the halted neighbours of a word rule out."""
        words, table = run.words, self._policy.transitions
        assert table is not None
        if not len(words):
            return logits
        table = table.to(logits.device)
        free = table.new_ones(1, len(table))
        follows, precedes = torch.cat((table, free)), torch.cat((table.t(), free))  # label -1: anything
        label = torch.where(run.halted, run.label, torch.full_like(run.label, -1))
        beside = words.segment[1:] == words.segment[:-1]
        left, right = torch.full_like(label, -1), torch.full_like(label, -1)
        left[1:] = torch.where(beside, label[:-1], left[1:])
        right[:-1] = torch.where(beside, label[1:], right[:-1])
        allowed = follows[left] & precedes[right]
        allowed |= ~allowed.any(1, keepdim=True)  # neighbours that leave no label at all rule out none
        allowed = torch.cat((allowed, free))[words.word]
        return logits.masked_fill(~allowed, -torch.inf)

    def _answered(self, run: Any, own: Callable[[], Tensor]) -> Tensor:
        """Logits of a batch whose encoder has ended; ``own`` makes those of the model, if any token wants them."""
        if not run.runs:
            return run.logits.unflatten(0, run.size)
        out = own()
        if run.whole:
            return out
        if self._policy.transitions is not None:
            places = run.words.place
            ruled = self._ruled(out.flatten(0, 1)[places], run)
            out = out.flatten(0, 1).index_copy(0, places, ruled).unflatten(0, run.size)
        return run.answered(out, self.depth - 1)

    def _end(self) -> None:
        """After the encoder: count."""
        run, self._local.running = self._local.running, None
        if run is None or run.next != self.depth:
            return
        self._local.ended = run
        self._local.depths = run.depth.unflatten(0, run.size)
        report = self._report
        report.forwards += 1
        report.rows += run.size[0]
        report.words += len(run.firsts)
        report.tokens += run.counted
        report.layer_tokens += run.layer_tokens
        report.key_tokens += run.key_tokens
        report.checks += run.checks
        report.exit_layers.append(run.depth[run.firsts].cpu())
        report.seconds += time.perf_counter() - run.started
