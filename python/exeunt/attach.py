"""The plug: puts a recipe on a stock causal language model and takes it off again.

What is replaced, on instances only: ``forward`` of each decoder layer and of the output embedding. Beside that a hook
on the input embedding notes which ids are fed (to see rows end), ``generate``'s cache gets exeunt's layers, and where
the state strategy is lazy ``generate`` settles that cache before it returns.
Embeddings, masks, rotary tables, norms, products and the decoding loop stay the model's own.

One decoding step of a batch, seen from above::

    layer 0 .. e   all rows        stock forward, unchanged arguments
    exit e         check           score -> rows that leave keep their state and their logits
    layer e+1 ..   staying rows    stock forward on these rows; rows that left: keys and values only, now or later
    head           staying rows    stock head; rows that left return the logits of their check
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exeunt import ops
from exeunt.calibration import Calibration
from exeunt.confidence import ExitPoint
from exeunt.encoder import AttachedEncoder
from exeunt.models import KeyValues, LayerCall, Structure, discover, encoder_in
from exeunt.models.structure import CACHE_KEYWORD
from exeunt.policies import At, keep
from exeunt.recipes import Recipe
from exeunt.report import Report
from exeunt.states import Drop
from exeunt.step import Step

if TYPE_CHECKING:
    from exeunt.cache import ExitCacheLayer, GenerationState
    from exeunt.heads import ExitHead

__all__ = ["Attached", "attach"]

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _UnderWay(threading.local):
    """What a thread is in the middle of; a forward stays on its thread."""

    ids: Tensor | None = None  # fed to the input embedding
    step: Step | None = None
    full_since: float | None = None
    cache: weakref.ref[Any] | None = None  # of the running generate
    paused: bool = False


def attach(
    model: Any,
    recipe: Recipe,
    *,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    buckets: bool = True,
) -> Any:
    """Let tokens of a stock causal language model, or texts of an encoder, leave early.

    Encoders (BERT and its kind; :mod:`exeunt.encoder`): the recipe brings ``ClassifierHeads``; a text of a batch leaves
    on its own, and the model returns what it always returns, in the same order.

    Language models: ``model.generate`` (greedy, sampling, beams, streamers, processors) works as before; every row of a
    batch leaves on its own. Prompts, forwards of several tokens and assisted decoding run at full depth.

    While nothing leaves, the output is bit-identical to the unattached model.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model of the Llama family, an encoder (bare, or with a classification or
        regression head), or a module of your own around an encoder.
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
        One sentence: a model without decoder layers, exits outside 0..L-2, heads of another width or dtype, a model
        that has exits already, a calibration of another model, other heads or another recipe.
    ImportError
        Without transformers.

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
    if encoder_in(model) is not None:
        return AttachedEncoder(model, recipe, calibration, buckets=buckets)
    return Attached(model, recipe, calibration)


class Attached:
    """Exits on a model: made by :func:`attach`, undone by :meth:`detach` or by leaving the ``with`` block.

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
    """

    def __init__(
        self, model: Any, recipe: Recipe, calibration: Calibration | str | os.PathLike[str] | None = None
    ) -> None:
        try:
            from exeunt import cache  # here, since it imports transformers, which the ops do without
        except ImportError as missing:
            raise ImportError("attach needs transformers: pip install exeunt[hf]") from missing
        if model in _attached:
            raise ValueError(f"attach: expected a model without exits, got a {type(model).__name__} that has them")
        self._cache = cache
        self.structure: Structure = discover(model)
        self.depth = len(self.structure.layers)
        recipe = recipe.over(self.depth)
        if calibration is not None:
            if not isinstance(calibration, Calibration):
                calibration = Calibration.load(calibration)
            recipe = calibration.apply(model, recipe)
        self.model, self.recipe, self.calibration = model, recipe, calibration
        if isinstance(recipe.state, Drop):
            raise ValueError("attach: expected a state strategy for a language model's skipped layers, got Drop()")
        self._state = recipe.state
        self._heads = {e: recipe.head(e) for e in recipe.exits or ()}
        self._exit = {e: k for k, e in enumerate(self._heads)}
        self._check_recipe()
        self._local = _UnderWay()
        self._spare: Tensor | None = None  # a logits buffer that no caller holds
        self._undo: list[Callable[[], None]] = []
        self.reset_report()
        try:
            self._install()
        except BaseException:
            self.detach()
            raise
        _attached.add(model)

    def __enter__(self) -> Attached:
        """Return itself; the exits are already on."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Restore the model; calling it again does nothing."""
        while self._undo:
            self._undo.pop()()
        _attached.discard(self.model)

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

    def _check_recipe(self) -> None:
        outside = [e for e in self._heads if not 0 <= e <= self.depth - 2]
        if outside:
            raise ValueError(f"attach: exits must lie in 0..{self.depth - 2} for {self.depth} layers, got {outside}")
        weight, policy = self.structure.weight, type(self.recipe.policy).__name__
        if self.recipe.policy.answers or self.recipe.policy.needs & {"logits", "truth"}:
            raise ValueError(f"attach: expected a policy whose tokens take their exit's own logits, got {policy}")
        if self.recipe.reads_head and weight.dtype not in ops.DTYPES:
            kinds = " or ".join(str(t) for t in ops.DTYPES)
            raise ValueError(
                f"attach: {self.recipe.measures} reads the head, which must be {kinds}, got {weight.dtype}"
            )
        for e, own in self._heads.items():
            for part in (own.translator, own.probe):
                if part is None:
                    continue
                if part.hidden_size != weight.shape[1]:
                    raise ValueError(
                        f"attach: expected exit heads of width {weight.shape[1]}, got {part.hidden_size} at exit {e}"
                    )
                dtype = weight.dtype if part is own.translator else torch.float32  # probes stay float32
                if (part.weight.dtype, part.weight.device) != (dtype, weight.device):
                    raise ValueError(
                        f"attach: exit heads must be {dtype} on {weight.device} like the model, "
                        f"got {part.weight.dtype} on {part.weight.device}: call heads.to(...)"
                    )

    def _install(self) -> None:
        s = self.structure
        for i, layer in enumerate(s.layers):
            self._set(layer, "forward", types.MethodType(self._layer(i, layer), layer))
        self._set(s.head, "forward", types.MethodType(self._head(s.head), s.head))

        def note_ids(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is embedding and args:
                self._local.ids = args[0]

        embedding = self.model.get_input_embeddings()
        self._undo.append(embedding.register_forward_pre_hook(note_ids).remove)

        prepare = self.model._prepare_cache_for_generation

        def prepare_cache(model: Any, config: Any, kwargs: dict[str, Any], *args: Any, **named: Any) -> Any:
            if model is not self.model:  # a copy of the model: its own method
                return type(model)._prepare_cache_for_generation(model, config, kwargs, *args, **named)
            result = prepare(config, kwargs, *args, **named)
            config.disable_compile = True  # generate's own copy; exits depend on data
            cache: Any = kwargs.get(CACHE_KEYWORD)
            state = self._cache.adopt(cache, self.depth)
            if state is not None:
                self._settle(cache)
                self._local.cache = weakref.ref(cache)
                state.begin_prompt(int(cache.get_seq_length()))
                mode = str(getattr(args[0] if args else named.get("generation_mode"), "value", ""))
                state.full_depth = "assisted" in mode
                state.max_length = config.max_length
                state.stop_ids = None if "beam" in mode else getattr(config, "_eos_token_tensor", None)
            return result

        self._set(self.model, "_prepare_cache_for_generation", types.MethodType(prepare_cache, self.model))
        stock_generate = self.model.generate

        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            if model is not self.model:
                return type(model).generate(model, *args, **kwargs)
            try:
                return stock_generate(*args, **kwargs)
            finally:  # nothing pending outlives the generation, unless its cache is gone as well
                cache, self._local.cache = self._local.cache, None
                self._settle(cache() if cache is not None else None)

        if self._state.lazy:
            self._set(self.model, "generate", types.MethodType(generate, self.model))

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute, to be undone."""
        present, old = name in vars(owner), vars(owner).get(name)

        def undo() -> None:
            if present:
                setattr(owner, name, old)
            else:
                delattr(owner, name)

        setattr(owner, name, value)
        self._undo.append(undo)

    # ---- a forward of the model

    def _begin(self, hidden: Tensor, arguments: dict[str, Any]) -> Step | None:
        """At layer 0: find out whether this forward is a decoding step, and set it up."""
        local = self._local
        ids, local.ids, local.step = local.ids, None, None
        local.full_since = time.perf_counter()
        cache = arguments.get(CACHE_KEYWORD)
        if cache is None or not arguments.get("use_cache", True):
            return None
        batch, count = hidden.shape[:2]
        length = int(cache.get_seq_length())
        state = self._cache.adopt(cache, self.depth)
        if state is None:
            self._report.unsupported_caches += int(count == 1 and length > 0)
            return None
        self._claim(state, cache)
        if count != 1 or length == 0:
            state.begin_prompt(length + count)
            return None
        if state.full_depth or local.paused:
            return None
        state.feed(ids if ids is not None and ids.shape == (batch, 1) else None)
        local.step = Step(batch, self.depth - 1, state, cache, length, hidden.device)
        return local.step

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
        self._settle(cache)
        state.fill, state.owner = self._fill, weakref.ref(self.model)

    def _layer(self, i: int, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of decoder layer i."""
        stock, local = module.forward, self._local
        names = [name for name in inspect.signature(stock).parameters][1:]
        checks = i in self._heads

        def forward(this: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if this is not module:  # a deep copy of the model: it runs as if nothing were attached
                return type(this).forward(this, hidden, *args, **kwargs)
            if args:
                kwargs.update(zip(names, args, strict=False))
            step = self._begin(hidden, kwargs) if i == 0 else local.step
            if step is None:
                return stock(hidden, **kwargs)
            if step.running == step.batch:
                out = stock(hidden, **kwargs)
                after = out[0] if isinstance(out, tuple) else out
            else:
                after = out = self._ragged(i, LayerCall(stock, hidden, kwargs, step.take, step.seen), step)
                if not step.running:
                    return out
            self._report.layer_rows += step.running
            if checks:
                self._check(i, step, hidden, after)
            step.hidden = after
            return out

        return forward

    def _ragged(self, i: int, call: LayerCall, step: Step) -> Tensor:
        """One layer of which some rows run; those that left owe it keys and values, and ended ones leave zeros."""
        layer: ExitCacheLayer = step.cache.layers[i]
        after = call.hidden
        if step.running:
            rows = step.rows
            assert rows is not None
            after = after.index_copy(0, rows, call.pick(rows).run(lambda own: layer.append(own, rows)))
        if step.left is not None:
            layer.owe(step.token, call, step.left)
            if not self._state.lazy:
                layer.settle()
        return after

    def _fill(self, skipped: list[tuple[LayerCall, Tensor]]) -> KeyValues:
        """Keys and values of a skipped layer: the state strategy's, counted."""
        self._report.fill_ins += sum(len(rows) for _, rows in skipped)
        return self._state.fill(skipped)

    def _settle(self, cache: Any) -> None:
        """Write all that is pending in a cache."""
        for layer in getattr(cache, "layers", ()):
            if isinstance(layer, self._cache.ExitCacheLayer):
                layer.settle()

    # ---- exit points and logits

    @torch.no_grad()
    def _check(self, i: int, step: Step, before: Tensor, after: Tensor) -> None:
        """Score the running rows after layer i and let those go that the policy releases."""
        own, recipe = self._heads[i], self.recipe
        at = At(self._exit[i], i, len(self._exit), step.position)
        if not recipe.policy.looks(at):
            return
        hidden, previous = after[:, 0], before[:, 0]
        classes, stats = self.structure.weight.shape[0], None
        if recipe.reads_head:
            stats = self._head_stats(self._exit_state(own, hidden, step), step)
        if step.rows is not None:
            hidden, previous = hidden[step.rows], previous[step.rows]
        if step.policy is None:
            step.policy = recipe.start(len(hidden), hidden.device, classes)
        leave, _ = recipe.look(step.policy, ExitPoint(hidden, previous, own, stats, classes), at)
        if step.leave(leave, i):
            step.policy = keep(step.policy, ~leave)
            step.state.exited = True

    def _exit_state(self, own: ExitHead, hidden: Tensor, step: Step) -> Tensor:
        """[B, D] states that go into the last norm; of the running rows only they matter."""
        if own.translator is None or step.rows is None:
            return own.state(hidden)
        return hidden.index_copy(0, step.rows, own.state(hidden[step.rows]))

    def _head_stats(self, state: Tensor, step: Step) -> Any:
        """Statistics of the exit's logits for the running rows; the logits themselves go to the step's buffer."""
        s = self.structure
        weight = s.weight
        if step.logits is None:
            shape = (step.batch, weight.shape[0])
            spare, self._spare = self._spare, None
            fits = (
                spare is not None
                and (spare.shape, spare.dtype, spare.device) == (shape, state.dtype, state.device)
                and spare.is_inference() == torch.is_inference_mode_enabled()
            )
            step.logits = spare if fits else state.new_empty(shape)
        norm = s.final_norm
        if norm is None:
            state = s.normalise(state)
        self._report.checks += 1
        self._report.head_reads += 1
        return ops.exit_stats(
            state.detach(),
            weight.detach(),
            head_bias=getattr(s.head, "bias", None),
            norm=norm.kind if norm else None,
            norm_weight=norm.weight if norm else None,
            norm_bias=norm.bias if norm else None,
            eps=norm.eps if norm else 0.0,
            rows=step.rows,
            logits_out=step.logits,
        )

    def _head(self, module: Any) -> Callable[..., Any]:
        """What stands in for the forward of the output embedding, called after the final norm."""
        stock, local = module.forward, self._local

        def forward(this: Any, normed: Tensor, *args: Any, **kwargs: Any) -> Any:
            if this is not module:
                return type(this).forward(this, normed, *args, **kwargs)
            step, local.step = local.step, None
            if step is None or normed.shape[:2] != (step.batch, 1):
                out = stock(normed, *args, **kwargs)
                self._count_full()
                return out
            out = self._logits(stock, normed, step)
            self._count(step)
            return out

        return forward

    def _logits(self, stock: Callable[..., Any], normed: Tensor, step: Step) -> Tensor:
        """Logits [B, 1, V]: of the check for rows that left at one, of the stock head for the others."""
        if step.running == step.batch:
            self._spare = step.logits  # nobody left: the buffer was not handed out
            self._report.head_reads += 1
            return stock(normed)
        if step.left is not None and step.logits is None:
            normed = self._translate(normed, step)
        out = step.logits
        if out is None:
            out = normed.new_empty(step.batch, self.structure.weight.shape[0])
        if step.ended is not None:
            out[step.ended] = 0.0
        asking = [r for r in (step.rows, None if step.logits is not None else step.left) if r is not None and r.numel()]
        if asking:
            rows = torch.cat(asking)
            out[rows] = stock(normed[rows])[:, 0]
            self._report.head_reads += 1
        return out[:, None]

    def _translate(self, normed: Tensor, step: Step) -> Tensor:
        """Normed states with those of rows that left without reading the head taken through their exit's translator."""
        assert step.left is not None and step.hidden is not None
        for layer, own in self._heads.items():
            rows = step.left[step.depth[step.left] == layer]
            if rows.numel() and own.translator is not None:
                normed = normed.index_copy(0, rows, self.structure.normalise(own.state(step.hidden[rows])))
        return normed

    # ---- counting

    def _count_full(self) -> None:
        since, self._local.full_since = self._local.full_since, None
        if since is not None:
            self._report.full_forwards += 1
            self._report.forward_seconds += time.perf_counter() - since

    def _count(self, step: Step) -> None:
        self._local.full_since = None
        if step.state.waiting > self._state.limit:
            self._settle(step.cache)
        self._report.steps += 1
        self._report.tokens += step.batch
        self._report.exit_layers.append(step.depth.cpu())
        self._report.step_seconds += time.perf_counter() - step.started
