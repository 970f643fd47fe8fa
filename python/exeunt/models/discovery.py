"""Finding the parts of a stock language model, each fact checked numerically before it is believed.

Three forwards of a few made-up tokens: one of two sequences (what runs, in which order, what the head reads), one of
three (which arguments of the layers have no batch dimension) and one decoding step (does a layer run on one row give
that row, are its keys and values what the cache received).
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exeunt.models.families import CACHE_KEYWORD, CACHE_KEYWORDS, LOGIT_BIAS, LOGIT_SCALES, SOFTCAP
from exeunt.models.layer_call import KeyValues, LayerCall, LayerFunction, RowTaker, own_cache, stand_in
from exeunt.models.structure import FinalNorm, HeadForm, Structure, eps_of, evaluating, told

__all__ = ["discover", "near", "trial_forward"]

_TOKENS = 4  # of a trial prompt


def discover(model: Any) -> Structure:
    """Find layers, final norm and head of a stock decoder or encoder-decoder language model.

    Parameters
    ----------
    model : nn.Module
        A transformers model that generates text: for causal language modelling, or an encoder-decoder.

    Returns
    -------
    Structure

    Raises
    ------
    ValueError
        Where a part is missing or the model works in another way; one sentence says which.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> len(discover(LlamaForCausalLM(config)).layers)
    3
    """
    name = type(model).__name__
    decoder, stack = _stack(model)
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None or head.weight.dim() != 2:
        raise ValueError(f"attach: expected an output embedding with a [V, D] weight, got none in {name}")
    for layer in stack:
        if not CACHE_KEYWORDS & set(inspect.signature(layer.forward).parameters):
            raise ValueError(
                f"attach: expected decoder layers that take a cache, got {type(layer).__name__} which does not"
            )
    try:
        with torch.no_grad(), evaluating(model):
            trace = _trace(model, decoder, stack, head)
            form = _head_form(model, head, trace)
            batched = _batched(model, trace.layers)
            _check_layers(model, trace, batched)
            # A dropout in the tail does nothing while the model is evaluated.
            tail = tuple(m for m in trace.tail if not isinstance(m, nn.Dropout))
            norm = _final_norm(tail, head.weight)
    except (LookupError, RuntimeError, TypeError, AttributeError) as failed:
        raise ValueError(
            f"attach: expected {name} to run made-up tokens, row by row, with no other memory than keys and values, "
            f"got {told(failed)}"
        ) from failed
    return Structure(model, decoder, trace.layers, tail, norm, head, form, batched)


def _stack(model: Any) -> tuple[Any, nn.ModuleList]:
    """The module that runs the decoder layers, and their list: the shallowest and largest one."""
    root = model.get_decoder() if hasattr(model, "get_decoder") else None
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    for start in (root, base):
        if not isinstance(start, nn.Module) or start is model:
            continue
        found = [
            (path.count("."), -sum(p.numel() for p in module.parameters()), path, module)
            for path, module in start.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and "encoder" not in path.split(".")
        ]
        if found:
            _, _, path, stack = min(found, key=lambda f: f[:3])
            owner, _, _ = path.rpartition(".")
            return start.get_submodule(owner), stack
    raise ValueError(
        f"attach: expected a causal language model with a stack of decoder layers, got {type(model).__name__}"
    )


# ---- trial forwards


class _Trace(NamedTuple):
    layers: tuple[nn.Module, ...]
    tail: tuple[nn.Module, ...]
    normed: Tensor  # after the tail
    head_input: Tensor
    head_output: Tensor
    logits: Tensor
    cache: Any


def trial_forward(model: Any, batch: int, tokens: int, **kwargs: Any) -> Any:
    """A forward of made-up tokens, of the decoder alone where there is an encoder.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from exeunt.models import trial_forward
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2))
    >>> trial_forward(model, batch=2, tokens=3).logits.shape
    torch.Size([2, 3, 64])
    """
    weight = model.get_output_embeddings().weight
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), weight.device)
    vocabulary = weight.shape[0]
    ids = torch.arange(2, 2 + batch * tokens, device=device).remainder(vocabulary).view(batch, tokens)
    if not model.config.is_encoder_decoder:
        return model(input_ids=ids, **kwargs)
    from transformers.modeling_outputs import BaseModelOutput

    width = getattr(model.config, "d_model", None) or model.config.hidden_size
    states = torch.randn(batch, _TOKENS + 1, width, generator=torch.Generator().manual_seed(0))
    encoded = BaseModelOutput(last_hidden_state=states.to(device, weight.dtype))
    return model(encoder_outputs=encoded, decoder_input_ids=ids, **kwargs)


def _trace(model: Any, decoder: nn.Module, stack: nn.ModuleList, head: Any) -> _Trace:
    """Run two sequences; return the layers and what runs after them, in call order."""
    calls: list[nn.Module] = []
    states: list[Tensor] = []
    ends: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(module)
        states.append(output[0] if isinstance(output, tuple) else output)

    watched = [*stack, *(m for m in decoder.children() if m is not stack)]
    handles = [m.register_forward_hook(note) for m in watched]
    handles.append(head.register_forward_hook(lambda m, args, output: ends.append((args[0], output))))
    name = type(model).__name__
    try:
        out = trial_forward(model, 2, _TOKENS, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()

    members = set(stack)
    at = [k for k, m in enumerate(calls) if m in members]
    layers = tuple(calls[k] for k in at)
    if len(layers) < 2 or len(set(layers)) != len(layers):
        raise ValueError(f"attach: expected at least two decoder layers, each called once, got {len(layers)} in {name}")
    if len(ends) != 1:
        raise ValueError(f"attach: expected one call of the output embedding in a forward of {name}, got {len(ends)}")
    cache = getattr(out, CACHE_KEYWORD, None)
    if not hasattr(own_cache(cache), "layers"):
        raise ValueError(f"attach: expected {name} to return a transformers.Cache, got {type(cache).__name__}")
    tail = tuple(calls[at[-1] + 1 :])
    normed = states[at[-1]]
    for module in tail:
        normed = module(normed)
    return _Trace(layers, tail, normed, *ends[0], out.logits, cache)


def _batched(model: Any, layers: tuple[nn.Module, ...]) -> dict[str, int]:
    """Arguments whose first dimension is a multiple of the batch, or has nothing to do with it."""
    sizes: dict[str, list[int]] = {}

    def note(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for name, value in LayerFunction(layer).bind(args, kwargs)[1].items():
            first = value[0] if isinstance(value, tuple) and value else value
            if isinstance(first, Tensor) and first.dim():
                sizes.setdefault(name, []).append(first.shape[0])

    # Later layers get what the first one returned, so the second is watched.
    handle = layers[1].register_forward_pre_hook(note, with_kwargs=True)
    try:
        for batch in (2, 3):
            trial_forward(model, batch, _TOKENS + 1, use_cache=False)
    finally:
        handle.remove()
    batched = {}
    for name, seen in sizes.items():
        if len(seen) == 2 and seen[0] > 1 and seen != [2, 3]:
            times = seen[0] // 2
            batched[name] = times if seen == [2 * times, 3 * times] else 0
    return batched


def _check_layers(model: Any, trace: _Trace, batched: dict[str, int]) -> None:
    """One decoding step: each layer, run for one row of two, gives what the stock batch gives that row."""
    name, rows = type(model).__name__, torch.tensor([1])
    pending: list[LayerCall] = []
    depth = -1

    def before(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal depth
        depth += 1
        function = LayerFunction(layer)
        hidden, named = function.bind(args, dict(kwargs))  # a call adds to it
        call = LayerCall(function, hidden, named, RowTaker(2, batched), stand_in(trace.cache, _TOKENS))
        pending[:] = [call.pick(rows.to(hidden.device))]

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        own_layer = own_cache(trace.cache).layers[depth]
        received: list[int] = []

        def attend(own: KeyValues) -> tuple[Tensor, Tensor]:
            received.append(own.layer)
            if received != [depth]:
                return own.keys, own.values
            # The last key of the stock cache is this step's own, so what is attended to is the same.
            keys, values = own_layer.keys[1:], own_layer.values[1:]
            if not (near(own.keys, keys[:, :, -1:]) and near(own.values, values[:, :, -1:])):
                raise ValueError(
                    f"attach: keys and values of layer {depth} of {name} depend on more than their own row"
                )
            return keys, values

        out = pending.pop().run(attend)
        if received != [depth]:
            raise ValueError(
                f"attach: expected decoder layer {depth} of {name} to hand one set of keys and values to its own cache "
                f"layer, got {received or 'none'}"
            )
        wanted, got = (o[0] if isinstance(o, tuple) else o for o in (output, out))
        if not near(got, wanted[1:]):
            raise ValueError(f"attach: decoder layer {depth} of {name} gives another output for a row of its own")

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in trace.layers]
    handles += [layer.register_forward_hook(after) for layer in trace.layers]
    try:
        trial_forward(model, 2, 1, **{CACHE_KEYWORD: trace.cache}, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()


# ---- head and norm


def near(got: Tensor, want: Tensor) -> bool:
    """Equal up to the rounding of products of another height.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models import near
    >>> want = torch.tensor([1.0, 100.0])
    >>> near(want + 0.001, want), near(want + 0.1, want)
    (True, False)
    """
    if got.shape != want.shape:
        return False
    tolerance = max(1e-4, 8 * torch.finfo(want.dtype).eps)
    return bool((got.float() - want.float()).abs().max() <= tolerance * want.float().abs().max().clamp_min(1e-6))


def _ratio(got: Tensor, of: Tensor) -> float:
    """The factor that takes ``of`` to ``got``, by least squares."""
    got, of = got.double().flatten(), of.double().flatten()
    return float((got @ of) / (of @ of).clamp_min(1e-300))


def _head_form(model: Any, head: Any, trace: _Trace) -> HeadForm | None:
    """How the logits follow from the state after the tail, or None if in a way that is not known here."""
    read, raw, logits = trace.head_input, trace.head_output, trace.logits
    before = 1.0 if torch.equal(read, trace.normed) else _ratio(read, trace.normed)
    if before != 1.0:  # the model multiplies by a power of its width, so a rounder number is nearby
        exact = read.shape[-1] ** -0.5
        before = exact if math.isclose(before, exact, rel_tol=1e-2) else before
    if not near(trace.normed * before, read):
        raise ValueError(
            f"attach: expected the head of {type(model).__name__} to read what follows its last layer and norm, "
            "got another input"
        )
    if head.weight.device.type == "meta" or not near(F.linear(read, head.weight, getattr(head, "bias", None)), raw):
        return None  # adapters, quantised weights: not a plain product
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, SOFTCAP, None)
    scales = [f(value) for key, f in LOGIT_SCALES.items() if (value := getattr(config, key, None))]
    # What the configuration says comes first: where logits are small a bound by tanh hardly shows.
    forms = [HeadForm(before, scale=scale, softcap=softcap) for scale in (*scales, 1.0) if softcap or scale != 1.0]
    if isinstance(getattr(model, LOGIT_BIAS, None), Tensor):
        forms.append(HeadForm(before, bias=LOGIT_BIAS))
    for form in (*forms, HeadForm(before), HeadForm(before, scale=_ratio(logits, raw))):
        z = raw.float() * form.scale
        if form.bias is not None:
            z = z + getattr(model, form.bias).float()
        if form.softcap is not None:
            z = form.softcap * torch.tanh(z / form.softcap)
        if torch.equal(raw, logits) if form == HeadForm(before) else near(z.to(logits.dtype), logits):
            return form
    return None


def _final_norm(tail: tuple[nn.Module, ...], weight: Tensor) -> FinalNorm | None:
    """The tail as one RMS or layer norm, if it behaves like one on a random state."""
    norm: Any = tail[0] if len(tail) == 1 else None
    if not isinstance(getattr(norm, "weight", None), Tensor) or norm.weight.dim() != 1:
        return None
    eps = eps_of(norm)
    if eps is None or norm.weight.device.type == "meta":
        return None
    x = torch.randn(4, norm.weight.shape[0], generator=torch.Generator().manual_seed(0)).to(norm.weight)
    got = norm(x).float()
    x32, bias = x.float(), getattr(norm, "bias", None)
    tolerance = 16 * torch.finfo(weight.dtype).eps
    for kind in ("rms", "layer"):
        if kind == "layer":
            x32 = x32 - x32.mean(-1, keepdim=True)
        for offset in (0.0, 1.0):
            want = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * (norm.weight.float() + offset)
            if bias is not None:
                want = want + bias.float()
            if torch.allclose(got, want, rtol=tolerance, atol=tolerance):
                return FinalNorm(kind, eps, norm, offset)
    return None
