"""The plug for encoders: rows of a batch leave between layers, each on its own.

What is replaced, on instances only: ``forward`` of each encoder layer, of the module that makes the logits, and of the
encoder around its own, where the mask of the batch is noted before it and rows are counted behind it. Embeddings,
masks, layers, poolers, losses and the type of the output stay the model's own.

One forward, seen from above::

    layer 0 .. e   all rows        stock forward, unchanged arguments
    exit e         check           exit head -> score -> policy; rows that leave keep their state and their logits
    layer e+1 ..   staying rows    stock forward on these rows, cut to their own length, in buckets of similar length
    last layer     all rows        back in their places, those that left with the state of their exit
    logits         staying rows    the model's own; rows that left return those of their exit head

Heads that build on the exits before them see all of these, as in training: those of exits that the recipe leaves out
run as well, though no row leaves there.

A layer hands on a tensor of the batch's shape that is not looked at: the rows that still run are kept here. So what
was traced holds (:mod:`exeunt.models.encoder_structure`): between two layers the model does nothing.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exeunt import buckets, ops
from exeunt.calibration import Calibration
from exeunt.classifier_heads import META, ClassifierHeads, View
from exeunt.confidence import MEASURES, ExitPoint
from exeunt.encoder_batch import Forward, Group
from exeunt.heads import ExitHead
from exeunt.models.encoder_structure import EncoderStructure, discover_encoder, first_tensor, named, parameters_of
from exeunt.plug import Plug
from exeunt.policies import At, Evidence, keep
from exeunt.recipes import Recipe
from exeunt.row_report import RowReport
from exeunt.stats import ExitStats

__all__ = ["AttachedEncoder"]

FEW = 64  # classes up to which a check is one call of ops.Check


class _UnderWay(threading.local):
    """What a thread is in the middle of; a forward stays on its thread."""

    running: Forward | None = None
    ended: Forward | None = None  # whose logits are still to come


class AttachedEncoder(Plug):
    """Exits on an encoder: made by :func:`exeunt.attach`, undone by :meth:`detach` or by leaving the ``with`` block.

    Attributes
    ----------
    model : nn.Module
        The model.
    recipe : Recipe
        What decides.
    structure : EncoderStructure
        What was found of the model.

    Examples
    --------
    >>> import torch, exeunt
    >>> from exeunt.classifier_heads import ClassifierHeads, LinearHead
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> model = BertForSequenceClassification(BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
    ...     num_hidden_layers=4, num_attention_heads=2)).eval()
    >>> recipe = exeunt.recipes.shallow_deep(0.5, heads=ClassifierHeads({e: LinearHead(16, 2) for e in range(3)}))
    >>> with torch.no_grad(), exeunt.attach(model, recipe) as early:
    ...     out = model(torch.randint(64, (3, 5)))
    >>> out.logits.shape, early.report().histogram  # of two labels one always has half of the probability
    (torch.Size([3, 2]), {0: 3})
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        *,
        buckets: bool = True,
    ) -> None:
        self._refuse_twice(model)
        self.structure = self._discover(model)
        calibration = self._loaded(calibration)
        if calibration is not None:
            recipe = calibration.apply(model if hasattr(model, "config") else self.structure.encoder, recipe)
        self.depth = len(self.structure.layers)
        self.model, self.recipe = model, recipe.over(self.depth)
        self._buckets = buckets
        self._check_recipe()
        self._local = _UnderWay()
        self.reset_report()
        self._put_on()

    def _discover(self, model: Any) -> EncoderStructure:
        return discover_encoder(model)

    def report(self) -> RowReport:
        """Everything counted since attach or :meth:`reset_report`."""
        return self._report

    def reset_report(self) -> None:
        """Start counting anew."""
        self._report = RowReport(layers=self.depth)

    # ---- putting it on

    def _check_recipe(self) -> None:
        s, recipe = self.structure, self.recipe
        exits = recipe.exits or ()
        outside = [e for e in exits if not s.first_exit <= e <= self.depth - 2]
        if outside:
            raise ValueError(
                f"attach: exits must lie in {s.first_exit}..{self.depth - 2} for {self.depth} layers, got {outside}"
            )
        if not isinstance(recipe.heads, ClassifierHeads):
            got = "none" if recipe.heads is None else type(recipe.heads).__name__
            raise ValueError(
                f"attach: expected a recipe with ClassifierHeads for an encoder, got {got} (a model that generates is "
                "attached as a causal language model, with its output embedding)"
            )
        bare = [e for e in exits if e not in recipe.heads]
        if bare:
            raise ValueError(f"attach: expected an exit head at every exit, got none at {bare}")
        classes = {recipe.heads[e].classes for e in exits}
        if s.classes is not None and classes != {s.classes}:
            raise ValueError(
                f"attach: expected exit heads of {s.classes} labels like the model, got {', '.join(map(str, classes))}"
            )
        measure = recipe.confidence
        if recipe.candidates is not None:
            raise ValueError(f"attach: {recipe.measures} names words of a vocabulary: expected a language model")
        if min(classes) < 2 and measure is not None and measure.reads_head:
            raise ValueError(
                f"attach: {measure.name} needs two labels or more, got a regression: use a probe, or patience"
            )
        width = s.encoder.config.hidden_size
        parameter = next(s.encoder.parameters())
        for e in exits:
            head = recipe.heads[e]
            if head.hidden_size != width:
                raise ValueError(f"attach: expected exit heads of width {width}, got {head.hidden_size} at exit {e}")
            got_kind = (head.out.weight.dtype, head.out.weight.device)
            if got_kind != (parameter.dtype, parameter.device):
                raise ValueError(
                    f"attach: exit heads must be {parameter.dtype} on {parameter.device} like the model, "
                    f"got {got_kind[0]} on {got_kind[1]}: call heads.to(...)"
                )
        self._heads: ClassifierHeads = recipe.heads
        # What heads say at exits where no row may leave is part of what later ones read.
        self._meta = measure is not None and measure.name == META.name
        self._remembering = {e for e in self._heads if e < exits[-1]} if self._heads.remembers or self._meta else set()
        ats = [At(k, layer, len(exits)) for k, layer in enumerate(exits)]
        self._exits = {at.layer: (at, self._kernel_check(at)) for at in ats}
        self._checks = [check for _, check in self._exits.values() if check is not None]

    def _kernel_check(self, at: At) -> ops.Check | None:
        """The check of an exit in one call of a kernel, where one can make it: a plain head, a plain threshold."""
        recipe, head, measure = self.recipe, self._heads[at.layer], self.recipe.confidence
        bound = recipe.policy.bound(at)
        known = measure is not None and MEASURES.get(measure.name) is measure and measure.name in ops.Check.MEASURES
        few = head.plain and not self._heads.remembers and head.classes <= FEW
        if bound is None or not known or not few or not ops.Check.runs_on(head.out.weight):
            return None
        assert measure is not None
        return ops.Check(**head.weights(), measure=measure.name, threshold=bound, tokens=head.pooling == "mean")

    def _install(self) -> None:
        s = self.structure
        for layer in dict.fromkeys(s.layers):
            self._set(layer, "forward", types.MethodType(self._layer(layer), layer))
        if s.output is not None:
            self._set(s.output, "forward", types.MethodType(self._output(s.output), s.output))
        self._set(s.encoder, "forward", types.MethodType(self._encoder(s.encoder), s.encoder))

    # ---- a forward of the model

    def _encoder(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of the encoder; no hooks, which a pickled copy would have to bring along."""
        stock, names = module.forward, parameters_of(module)

        @functools.wraps(type(module).forward)
        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not module:  # a copy of the model: it runs as if nothing were attached
                return type(this).forward(this, *args, **kwargs)
            self._begin(*named(names, args, kwargs))
            out = stock(*args, **kwargs)
            self._end()
            return out

        return forward

    def _begin(self, ids: Tensor | None, given: dict[str, Any]) -> None:
        """Before the encoder: refuse what exits cannot serve, and note the mask."""
        local, config = self._local, self.structure.encoder.config
        local.running = local.ended = None
        if self.structure.encoder.training:
            return
        texts = given.get("inputs_embeds") if ids is None else ids
        if texts is None:
            return
        batch, length = texts.shape[:2]
        if not batch:
            raise ValueError("attach: expected at least one row, got an empty batch")
        longest = self.structure.longest
        if longest is not None and length > longest:
            raise ValueError(f"attach: expected at most {longest} tokens a row, got {length}: truncate the text")
        for name in ("output_hidden_states", "output_attentions"):
            if given.get(name) or (given.get(name) is None and getattr(config, name, False)):
                raise ValueError(f"attach: expected a forward without {name}, since rows that left have none there")
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        local.running = Forward(mask, self.depth, texts.device)

    def _layer(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of an encoder layer."""
        stock, local, last, names = module.forward, self._local, self.depth - 1, parameters_of(module)

        @functools.wraps(type(module).forward)  # by whose parameters exits on a copy name what it is called with
        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not module:  # a deep copy of the model: it runs as if nothing were attached
                return type(this).forward(this, *args, **kwargs)
            run = local.running
            if run is None:
                return stock(*args, **kwargs)
            i, run.next = run.next, run.next + 1
            hidden = args[0] if args else kwargs[names[0]]
            if i == 0:
                self._start(run, hidden)
            elif run.groups:
                self._judge(i - 1, run, hidden)
            if run.final is None:
                out = stock(*args, **kwargs)
                run.returned = len(out) if isinstance(out, tuple) else 0
                group = run.groups[0]
                group.previous, group.hidden = hidden, first_tensor(out)
                run.count(group)
                return out
            if run.groups:
                _, arguments = named(names, args, kwargs)
            for group in run.groups:
                own = stock(group.hidden, **group.pick(arguments, self.structure.layout, run.size))
                group.previous, group.hidden = group.hidden, first_tensor(own)
                run.count(group)
            out = self._gathered(run) if i == last else hidden
            return (out, *[None] * (run.returned - 1)) if run.returned else out

        return forward

    def _start(self, run: Forward, hidden: Tensor) -> None:
        """Before layer 0: one group of all rows."""
        run.size = batch, _ = (hidden.shape[0], hidden.shape[1])
        state = self.recipe.start(batch, hidden.device, self._heads.classes)
        if run.mask is not None:  # None without padding: a mean over all tokens is one call
            run.mask = None if bool(run.mask.all()) else run.mask != 0
        run.groups = [Group(None, hidden, run.mask, {}, state)]
        run.room = ops.Check.room(self._checks, hidden)

    def _gathered(self, run: Forward) -> Tensor:
        """After the last layer: the states of all rows in their places."""
        assert run.final is not None
        for group in run.groups:
            assert group.rows is not None
            run.place(group.rows, group.hidden)
        return run.final

    # ---- exits and logits

    def _judge(self, layer: int, run: Forward, hidden: Tensor) -> None:
        """After a layer: let exit heads look at the rows that run, and those go that the policy releases."""
        if run.final is None:
            run.groups[0].hidden = hidden
        exit, observes = self._exits.get(layer), self._heads.observes
        if exit is None and not observes and layer not in self._remembering:
            return
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._judge(layer, run, hidden)
        if observes:
            for group in run.groups:
                self._heads.observe(View(group.hidden, group.mask, layer, group.memory))
        if exit is not None and self.recipe.policy.looks(exit[0]):
            run.groups = [left for group in run.groups for left in self._release(*exit, group, run)]
        elif layer in self._remembering:
            for group in run.groups:
                self._point(layer, group)

    def _release(self, at: At, check: ops.Check | None, group: Group, run: Forward) -> Sequence[Group]:
        """Let go the rows of a group that may leave; the others."""
        n = len(group)
        run.checks += n
        gone, out = (-1, None) if run.room is None or check is None else check(group.hidden, group.mask, run.room)
        if not gone:
            return (group,)
        policy = self.recipe.policy
        if gone > 0:
            assert check is not None and out is not None
            logits, leave = check.logits(out, n), check.leave(out, n) if gone < n else None
            seen = Evidence(logits=logits)
        else:
            point = self._point(at.layer, group)
            assert point.logits is not None
            logits = point.logits
            leave, seen = self.recipe.look(group.state, point, at)
            gone = int(leave.sum())
            if not gone:
                return (group,)
        state, first, going_on = group.state, None, []
        if gone < n:
            assert leave is not None
            order = ops.compact(leave)[0]
            first = order[:gone]
            state, seen, logits = keep(state, first), seen.take(first), logits[first]
            going_on = self._regroup(group, order[gone:], run)
        if policy.answers:
            own = policy.answer(state, seen, at).logits
            assert own is not None
            logits = own
        run.leave(group, first, logits.to(group.hidden.dtype), at.layer)
        return going_on

    def _regroup(self, group: Group, rows: Tensor, run: Forward) -> list[Group]:
        """What is left of a group, in buckets of similar length."""
        if not self._buckets:
            return [group.take(rows, group.hidden.shape[1])]
        if run.lengths is None:
            run.lengths = buckets.lengths(run.mask, *run.size, group.hidden.device)
        own = run.lengths[rows if group.rows is None else group.rows[rows]]
        return [group.take(rows[part], int(own[part].max())) for part in buckets.cut(own)]

    def _point(self, layer: int, group: Group) -> ExitPoint:
        """What the rows of a group show at an exit."""
        head, measure = self._heads[layer], self.recipe.confidence
        view = View(group.hidden, group.mask, layer, group.memory)
        judged = head.judge(view)
        state = before = judged.logits  # measures of logits look at no state
        if self._meta and head.meta is not None:
            state = head.meta.seen(view, judged, (layer + 1) / self.depth)
        elif measure is not None and not measure.reads_head:
            state, before = head.pooled(view), head.pooled(view._replace(hidden=group.previous))
        return ExitPoint(state, before, head, judged.stats, head.classes, judged.logits)

    def _output(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of the module that makes the logits."""
        stock, local = module.forward, self._local

        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not module:
                return type(this).forward(this, *args, **kwargs)
            run, local.ended = local.ended, None
            own = functools.partial(stock, *args, **kwargs)
            return own() if run is None else self._answered(run, own)

        return forward

    def _answered(self, run: Any, own: Callable[[], Tensor]) -> Tensor:
        """Logits of a batch whose encoder has ended; ``own`` makes those of the model, if any row wants them."""
        if not run.groups:
            return run.logits
        out = own()
        if self.recipe.policy.answers:
            out = self._full_depth(out, run)
        if run.whole:
            return out
        return torch.where((run.depth < self.depth - 1)[:, None], run.logits.to(out.dtype), out)

    @torch.no_grad()
    def _full_depth(self, logits: Tensor, run: Forward) -> Tensor:
        """The model's own logits [B, C] with those of rows that went all the way as the policy answers for them."""
        policy, at = self.recipe.policy, At(len(self._exits), self.depth - 1, len(self._exits))
        for group in run.groups:
            own = (logits if group.rows is None else logits[group.rows]).float()
            stats, measure = ExitStats.from_logits(own), self.recipe.confidence
            if measure is None or measure.reads_head:
                point = ExitPoint(own, own, ExitHead(), stats, own.shape[1], own)
                _, seen = self.recipe.look(group.state, point, at)
            else:  # a probe or a saturation has nothing to say of full depth
                seen = Evidence(torch.full_like(stats.top1, math.nan), stats.argmax, stats.max_prob, own)
                policy.step(group.state, seen, at)
            answer = policy.answer(group.state, seen, at)
            assert answer.logits is not None
            places = torch.arange(len(own), device=own.device) if group.rows is None else group.rows
            logits = logits.index_copy(0, places, answer.logits.to(logits.dtype))
        return logits

    def _end(self) -> None:
        """After the encoder: count."""
        run, self._local.running = self._local.running, None
        if run is None or run.next != self.depth:
            return
        run.finish()
        self._local.ended = run
        report = self._report
        report.forwards += 1
        report.rows += run.size[0]
        report.layer_rows += run.layer_rows
        report.layer_tokens += run.layer_tokens
        report.checks += run.checks
        report.exit_layers.append(run.depth.cpu())
        report.seconds += time.perf_counter() - run.started
