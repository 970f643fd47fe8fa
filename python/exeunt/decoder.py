"""Exits on a stock language model.

What is replaced, on instances only: ``forward`` of each decoder layer and of the output embedding; that of the input
embedding, to note which ids are fed (rows end by them); and of ``generate`` the start, where its cache gets exeunt's
layers, and the end, where that cache is settled.
Embeddings, masks, rotary tables, norms, products and the decoding loop stay the model's own.

One decoding step of a batch, seen from above::

    layer 0 .. e   all rows        stock forward, unchanged arguments
    exit e         check           score -> rows that leave keep their state and their logits
    layer e+1 ..   staying rows    stock forward on these rows; rows that left: keys and values only, now or later
    head           staying rows    stock head; rows that left return the logits of their check
"""

from __future__ import annotations

import functools
import os
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exeunt.calibration import Calibration
from exeunt.deferred import Deferred
from exeunt.exit_points import ExitPoints
from exeunt.fill import fill_in
from exeunt.graphs import Graphs
from exeunt.models import (
    CACHE_KEYWORD,
    KeyValues,
    KeyValueWeights,
    LayerCall,
    LayerFunction,
    Structure,
    attention,
    discover,
    hide_keys,
    own_cache,
    spread,
)
from exeunt.plug import Plug
from exeunt.policies import Adaptive
from exeunt.recipes import Recipe
from exeunt.report import Report
from exeunt.states import Defer, Drop, Evict, Freeze, Propagate
from exeunt.step import Step
from exeunt.trial import try_state

if TYPE_CHECKING:
    from exeunt.cache import ExitCacheLayer
    from exeunt.generation import GenerationState

__all__ = ["Attached"]

_KEPT = "exeunt: no exits in this {}: {} keeps it at full depth"


class _UnderWay(threading.local):
    """What a thread is in the middle of; a forward stays on its thread."""

    ids: Tensor | None = None  # fed to the input embedding
    step: Step | None = None
    full_since: float | None = None
    cache: weakref.ref[Any] | None = None  # of the running generate
    prompt: int = 0  # tokens that it was given, a decoder's
    paused: bool = False
    asked: str | None = None  # what the running forward is to return of every layer


class Attached(Plug):
    """Exits on a language model: made by :func:`exeunt.attach`, undone by :meth:`detach` or by leaving the ``with``.

    Attributes
    ----------
    model : nn.Module
        The model.
    recipe : Recipe
        What decides.
    calibration : Calibration or None
        Where its threshold comes from.
    structure : Structure
        What was found of the model.

    Examples
    --------
    >>> import torch, exeunt
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)).eval()
    >>> early, ids = exeunt.attach(model, exeunt.recipes.calm(exits=[1], threshold=0.0)), torch.tensor([[3, 5, 7]])
    >>> with early.paused():
    ...     full = model.generate(ids, max_new_tokens=4, do_sample=False)
    >>> out = model.generate(ids, max_new_tokens=4, do_sample=False)
    >>> early.report().tokens, early.report().layers_per_token
    (3, 2.0)
    >>> early.detach()
    """

    def __init__(
        self, model: Any, recipe: Recipe, calibration: Calibration | str | os.PathLike[str] | None = None
    ) -> None:
        try:
            from exeunt import cache, limits  # here, since they import transformers, which the ops do without
        except ImportError as missing:
            raise ImportError("attach needs transformers: pip install exeunt[hf]") from missing
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps the model
        self._refuse_twice(model)
        self._cache, self._limits = cache, limits
        limits.check_model(model)
        self.structure: Structure = discover(model)
        self.depth = len(self.structure.layers)
        recipe = recipe.over(self.depth)
        self.calibration = self._loaded(calibration)
        if self.calibration is not None:
            recipe = self.calibration.apply(model, recipe)
        self.model, self.recipe = model, recipe
        self._config = model.config.get_text_config(decoder=True)
        if isinstance(recipe.state, (Drop, Freeze)):
            raise ValueError(
                f"attach: expected a state strategy for a language model's skipped layers, got {recipe.state}"
            )
        self._state = recipe.state
        self._again = isinstance(recipe.state, Defer) and recipe.state.again
        self._evicts = isinstance(recipe.state, Evict)
        self._adapts = isinstance(recipe.policy, Adaptive)
        if isinstance(recipe.policy, Adaptive) and not isinstance(recipe.state, Defer):
            raise ValueError(
                "attach: an adaptive threshold learns from tokens that left and run deep later: expected the state "
                f"strategy Defer, got {type(recipe.state).__name__}"
            )
        self._points = ExitPoints(self.structure, recipe)
        self._weights = KeyValueWeights.find(self.structure, packed=getattr(recipe.state, "packed", False))
        self._graphs = Graphs.of(self.structure, recipe)
        self._local = _UnderWay()
        self.reset_report()
        self._put_on()
        if not isinstance(self._state, Propagate):
            try:
                try_state(self)
            except BaseException:
                self.detach()
                raise

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run this thread's forwards at full depth inside of the block; generations begun before keep their caches."""
        before, self._local.paused = self._local.paused, True
        try:
            yield
        finally:
            self._local.paused = before

    def report(self) -> Report:
        """Everything counted since attach or :meth:`reset_report`."""
        return self._report

    def reset_report(self) -> None:
        """Start counting anew."""
        self._report = Report(layers=self.depth)

    # ---- putting it on

    def _install(self) -> None:
        s = self.structure
        for i, layer in enumerate(s.layers):
            self._set(layer, "forward", types.MethodType(self._layer(i, layer), layer))
        self._set(s.head, "forward", types.MethodType(self._head(s.head), s.head))

        embedding = s.decoder.get_input_embeddings()
        embed = embedding.forward

        def forward(this: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not embedding:
                return type(this).forward(this, ids, *args, **kwargs)
            self._local.ids = ids
            return embed(ids, *args, **kwargs)

        self._set(embedding, "forward", types.MethodType(forward, embedding))
        self._install_generate()
        self._install_decoder(s.decoder)
        if self._graphs is not None:
            self._undo.append(self._graphs.clear)

    def _install_decoder(self, module: Any) -> None:
        """Note whether a forward is to return what every layer gives: not all of them run, and none while in graphs."""
        stock, local, config = module.forward, self._local, self._config

        @functools.wraps(type(module).forward)
        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not module:
                return type(this).forward(this, *args, **kwargs)
            names = ("output_attentions", "output_hidden_states")
            local.asked = next((n for n in names if kwargs.get(n) or getattr(config, n, False)), None)
            return stock(*args, **kwargs)

        self._set(module, "forward", types.MethodType(forward, module))

    def _install_generate(self) -> None:
        """``generate`` with a cache of exeunt's layers, and nothing of it left behind."""
        prepare = self.model._prepare_cache_for_generation

        def prepare_cache(
            model: Any, config: Any, kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
            max_cache_length: int,
        ) -> Any:  # fmt: skip
            given = config, kwargs, generation_mode, batch_size, max_cache_length
            if model is not self.model:  # a copy of the model: its own method
                return type(model)._prepare_cache_for_generation(model, *given)
            mode = str(getattr(generation_mode, "value", ""))
            kept = self._limits.full_depth(mode, config)
            result = prepare(*given)
            config.disable_compile = True  # generate's own copy; exits depend on data
            cache = kwargs.get(CACHE_KEYWORD)
            if kept is not None:
                warnings.warn(_KEPT.format("generation", kept), stacklevel=4)
            if cache is None and config.use_cache is not False:  # transformers 5.0 leaves it to the first forward
                cache = kwargs[CACHE_KEYWORD] = self._limits.default_cache(model)
            if cache is not None:
                state = self._limits.adopted(cache, self.depth)
                self._settle(cache)
                self._local.cache = weakref.ref(cache)
                length = int(cache.get_seq_length())
                state.begin_prompt(length)
                # What of the prompt is not in the cache may come in chunks, the last of a single token.
                state.prompt_end = max(length + 1, self._local.prompt)
                # config.max_length says nothing of a prompt of embeddings; the last token goes into no cache.
                state.full_depth, state.max_length = kept is not None, max_cache_length + 1
                state.stop_ids = None if "beam" in mode else getattr(config, "_eos_token_tensor", None)
            return result

        self._set(self.model, "_prepare_cache_for_generation", types.MethodType(prepare_cache, self.model))
        stock_generate = self.model.generate

        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if model is not self.model:
                return type(model).generate(model, *args, **kwargs)
            given = [*(kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")), *args[:1]]
            prompt = next((t for t in given if t is not None), None)
            self._local.prompt = 0 if prompt is None or model.config.is_encoder_decoder else prompt.shape[1]
            try:
                return stock_generate(*args, **kwargs)
            finally:  # nothing pending outlives the generation, unless its cache is gone as well
                self._local.prompt = 0
                cache, self._local.cache = self._local.cache and self._local.cache(), None
                if cache is not None:
                    self._settle(cache)
                    state = self._limits.adopted(cache, self.depth)
                    state.full_depth, state.max_length, state.stop_ids, state.prompt_end = False, None, None, 1

        self._set(self.model, "generate", types.MethodType(generate, self.model))

    # ---- a forward of the model

    def _begin(self, hidden: Tensor, arguments: dict[str, Any]) -> Step | None:
        """At layer 0: find out whether this forward is a decoding step, and set it up."""
        local = self._local
        ids, local.ids, local.step = local.ids, None, None
        local.full_since = time.perf_counter()
        attention.counting(self._report.attention)
        if self.model.training:
            raise RuntimeError("attach: the model is in training mode: call model.eval(), or detach to train it")
        cache = arguments.get(CACHE_KEYWORD)
        if cache is None or not arguments.get("use_cache", True):
            return None
        batch, count = hidden.shape[:2]
        length = int(cache.get_seq_length())
        state = self._limits.adopted(cache, self.depth)
        self._claim(state, cache)
        if state.deferred is not None:
            state.deferred.under_way = False  # a decoder that was called without its head says nothing at the end
        if count != 1 or length < state.prompt_end:
            state.begin_prompt(length + count)
            if not (state.full_depth or local.paused) and self._adapters_by_row():
                state.full_depth = True
                warnings.warn(_KEPT.format("generation", "adapter_names"), stacklevel=2)
            if isinstance(self.recipe.policy, Adaptive) and length == 0 and not local.paused:
                self.recipe.policy.begin(batch)
            return None
        if state.full_depth or local.paused:
            return None
        if local.asked == "output_attentions":
            warnings.warn(_KEPT.format("step", "output_attentions"), stacklevel=2)
            return None
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise RuntimeError("attach: decoding with exits has no gradient: run it under torch.no_grad()")
        state.feed(ids if ids is not None and ids.shape == (batch, 1) else None)
        step = Step(batch, self.depth - 1, state, cache, length, hidden.device, self.structure, self._report)
        step.apart = self._config._attn_implementation == attention.NAME
        if state.deferred is not None:
            state.deferred.begin(step.rows, step.apart)
            step.first = hidden if self._again else None
        step.calls = [] if self._graphs is not None and self._graphs.ready(step, local.asked) else None
        local.step = step
        return step

    def _adapters_by_row(self) -> bool:
        """PEFT's ``adapter_names``: its hooks hold one name for each row of the batch, whichever rows are run."""
        modules = (module for layer in self.structure.layers for module in layer.modules())
        hooks = (hook for module in modules for hook in module._forward_pre_hooks.values())
        return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)

    def _claim(self, state: GenerationState, cache: Any) -> None:
        """From here on this recipe fills the cache; what an earlier one left pending is settled first."""
        if state.fill == self._fill:
            return
        owner = state.owner() if state.owner is not None else None
        if owner is not None and owner is not self.model:
            raise ValueError(
                f"cache: expected one that this {type(self.model).__name__} filled, "
                f"got one of another {type(owner).__name__}"
            )
        for layer in own_cache(cache).layers:
            layer.settle()
        state.fill, state.owner = self._fill, weakref.ref(self.model)
        state.deferred = None
        if isinstance(self._state, Defer):
            deepened = self._deepened if self._adapts else None
            state.deferred = Deferred(own_cache(cache), self._again, self._count_late, deepened)

    def _layer(self, i: int, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of decoder layer i."""
        stock, local = LayerFunction(module), self._local
        checks, skip = i in self._points.heads, self._state.skip
        # Layers that a row which runs this one will surely run: what they owe is written together.
        segment_end = min((e for e in self._points.heads if e >= i), default=self.depth - 1) + 1
        joins = i - 1 in self._points.heads or (i == 0 and self._again)  # tokens may wait for this layer

        @functools.wraps(type(module).forward)
        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not module:  # a deep copy of the model: it runs as if nothing were attached
                return type(this).forward(this, *args, **kwargs)
            hidden, kwargs = stock.bind(args, kwargs)
            step = self._begin(hidden, kwargs) if i == 0 else local.step
            try:
                return run(hidden, kwargs, step)
            except BaseException:
                if step is not None and step.state.deferred is not None:
                    step.state.deferred.abandon()
                raise

        def run(hidden: Tensor, kwargs: dict[str, Any], step: Step | None) -> Any:
            if step is not None and not step.running and step.state.deferred is None:  # nobody runs what remains
                if step.left is not None:
                    skip(step.cache.layers[i], i, LayerCall(stock, hidden, kwargs, step.take, step.seen), step)
                return hidden if step.rest is None else (hidden, *step.rest)
            if self._evicts:
                kwargs = self._without_evicted(i, hidden.shape[1], kwargs)
            if step is None:
                out = stock(hidden, **kwargs)
                if self._graphs is not None and local.asked is None:
                    self._graphs.prompt(out)
                return out
            if step.calls is not None and self._graphs is not None:
                step.calls.append(LayerCall(stock, hidden, kwargs, step.take, step.seen))
                return self._graphs.like(hidden if i + 1 < segment_end else self._segment(i, step))
            if step.running and i in step.state.pending:
                self._settle(step.cache, i, segment_end)
            deferred = step.state.deferred
            if deferred is not None:
                if joins:
                    deferred.gather(i, step.rows)
                if self._again:
                    deferred.note(step.length, i, LayerCall(stock, hidden, {**kwargs}, step.take, step.seen))
            if step.running == step.batch and (deferred is None or deferred.company is None):
                out = stock(hidden, **kwargs)
                after, step.rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            else:
                after = self._ragged(i, LayerCall(stock, hidden, kwargs, step.take, step.seen), step)
                out = after if step.rest is None else (after, *step.rest)
                if not step.running:
                    return out
            self._report.layer_rows += step.running
            if checks:
                before = step.running
                self._points.check(i, step, hidden, after)
                if deferred is not None and step.running < before:
                    deferred.leave(i, step, after)
            step.hidden = after
            return out

        return forward

    def _ragged(self, i: int, call: LayerCall, step: Step) -> Tensor:
        """One layer of which some rows run; those that left owe it keys and values, and ended ones leave zeros."""
        layer: ExitCacheLayer = step.cache.layers[i]
        after = call.hidden
        if step.running:
            deferred, rows = step.state.deferred, step.running_rows
            if deferred is not None and deferred.company is not None:
                some, rest = deferred.run(i, layer, (call, rows, step.length))
            else:
                length = step.length + 1
                picked = call.pick(rows, (length, layer.seen(length)) if step.apart else None)
                out = picked.run(lambda own: layer.append(own, rows, gather=not picked.apart))
                some, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            after = after.index_copy(0, rows, some)
            step.rest = spread(rest, rows, step.batch, step.rest)
        if step.left is not None:
            self._state.skip(layer, i, call, step)
        return after

    def _segment(self, last: int, step: Step) -> Tensor:
        """The layers up to ``last`` that a step has noted, run in one graph; what the model goes on with."""
        calls, step.calls = step.calls or [], []
        first, graphs = last + 1 - len(calls), self._graphs
        before = after = calls[0].hidden
        if step.running:
            if any(i in step.state.pending for i in range(first, last + 1)):
                self._settle(step.cache, first, last + 1)
            done = graphs.run(first, calls, step) if graphs is not None else None
            if done is None:
                step.calls = None  # the rest of the step runs as it does without graphs
                for i, call in enumerate(calls, first):
                    call.hidden = before = after
                    after = self._ragged(i, call, step)
            else:
                before, after = done
        if step.left is not None and step.calls is not None:
            for i, call in enumerate(calls, first):
                self._state.skip(step.cache.layers[i], i, call, step)
        if step.running:
            self._report.layer_rows += step.running * len(calls)
            if last in self._points.heads:
                self._points.check(last, step, before, after)
        step.hidden = after
        return after

    def _without_evicted(self, i: int, new: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of layer i with the keys hidden that it never got; ``new`` tokens are about to be run."""
        layers = getattr(own_cache(arguments.get(CACHE_KEYWORD)), "layers", ())
        if len(layers) <= i or not isinstance(layers[i], self._cache.ExitCacheLayer):
            return arguments
        absent = layers[i].absent(new)
        return arguments if absent is None else hide_keys(arguments, absent, new)

    def _fill(self, skipped: list[tuple[LayerCall, Tensor]]) -> KeyValues:
        """Keys and values of one skipped layer by its own code: the state strategy's, counted."""
        rows = sum(len(rows) for _, rows in skipped)
        self._report.fill_ins += rows
        self._report.captures += rows
        assert isinstance(self._state, Propagate)  # no other strategy owes anything
        return self._state.fill(skipped)

    def _count_late(self, rows: int) -> None:
        self._report.layer_rows += rows
        self._report.late_rows += rows

    def _deepened(self, scores: Tensor, labels: Tensor, hidden: Tensor) -> None:
        self._report.head_reads += 1
        self._points.deepened(scores, labels, hidden)

    def _settle(self, cache: Any, first: int = 0, until: int | None = None) -> None:
        """Write what layers of a cache owe; all of them by default."""
        layers = getattr(own_cache(cache), "layers", ())
        if layers and isinstance(layers[0], self._cache.ExitCacheLayer) and len(layers) == self.depth:
            if layers[0].state is not None and layers[0].state.deferred is not None:
                layers[0].state.deferred.flush()
            filled = fill_in(layers, self._weights, first, until)  # _fill may count meanwhile
            self._report.fill_ins += filled

    def _head(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of the output embedding, called after the final norm."""
        stock, local = module.forward, self._local

        def forward(this: Any, normed: Tensor, *args: Any, **kwargs: Any) -> Any:
            if this is not module:
                return type(this).forward(this, normed, *args, **kwargs)
            step, local.step = local.step, None
            attention.counting(None)
            if step is None or normed.shape[:2] != (step.batch, 1):
                out = stock(normed, *args, **kwargs)
                self._count_full()
                return out
            out = self._points.logits(stock, normed, step)
            if step.lesson is not None:
                self._points.learn(step, out)
            self._count(step)
            return out

        return forward

    # ---- counting

    def _count_full(self) -> None:
        since, self._local.full_since = self._local.full_since, None
        if since is not None:
            self._report.full_forwards += 1
            self._report.forward_seconds += time.perf_counter() - since

    def _count(self, step: Step) -> None:
        self._local.full_since = None
        if step.state.deferred is not None:
            step.state.deferred.under_way = False
        if self._state.overdue(step.state):
            self._settle(step.cache)
        self._report.steps += 1
        self._report.tokens += step.batch
        self._report.exit_layers.append(step.depth)
        self._report.step_seconds += time.perf_counter() - step.started
