"""Finding the parts of a stock encoder, by watching it run twice.

Two forwards of different batch size and length show all there is to know: in which order layers are called (ALBERT
calls one of them twelve times), which axes of their arguments are rows and which are tokens, where the logits come
from, and from which layer on nothing happens between one layer and the next. Then each layer runs for a row alone, and
has to give what the batch gave that row.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exeunt.models.discovery import near
from exeunt.models.families import CACHE_KEYWORDS
from exeunt.models.structure import evaluating, told

__all__ = ["EncoderStructure", "Layout", "discover_encoder", "encoder_in", "watched"]

ROW, PLACE = "row", "place"
ATTENTIONS = ("eager", "sdpa")
_SIZES = ((2, 5), (3, 7))  # rows and tokens of the two forwards
PADDING = 2  # tokens of the last row that are padding


@dataclass(frozen=True)
class EncoderStructure:
    """The parts of an encoder that early exit touches.

    Attributes
    ----------
    model : nn.Module
        What was given: an encoder, or a module with one inside it.
    encoder : transformers.PreTrainedModel
        The encoder; its configuration is what exit heads are saved for.
    layers : tuple of nn.Module
        Its layers in the order of their calls; one that shares its weights comes more than once.
    first_exit : int
        No row can leave before this layer has run: up to there the model does more than call one layer after the other.
    output : nn.Module or None
        The module whose output are the logits; None for a bare encoder.
    classes : int or None
        Logits of a row, C; None for a bare encoder.
    longest : int or None
        Tokens of a row at most, None without a limit.
    layout : Layout
        Axes of what the layers take.
    tokens : bool
        Whether the logits are those of every token.
    apart : tuple of int
        Layers behind which the model does more than call the next one.

    Examples
    --------
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from exeunt.models import discover_encoder
    >>> found = discover_encoder(BertForSequenceClassification(BertConfig(vocab_size=64, hidden_size=16,
    ...     intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=40)))
    >>> len(found.layers), found.first_exit, found.classes, found.longest
    (4, 0, 2, 40)
    >>> type(found.output).__name__
    'Linear'
    """

    model: Any
    encoder: Any
    layers: tuple[Any, ...]
    first_exit: int
    output: Any
    classes: int | None
    longest: int | None
    layout: Layout
    tokens: bool = False
    apart: tuple[int, ...] = ()


@dataclass
class Layout:
    """Which axes of a layer's arguments are rows, and which are tokens.

    Attributes
    ----------
    axes : dict
        By argument, and place in it where it is a tuple: ``"row"``, ``"place"`` or None for each axis.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models.encoder_structure import Layout
    >>> layout = Layout()
    >>> layout.note(("attention_mask",), torch.ones(2, 1, 1, 5), torch.ones(3, 1, 1, 7))  # 2 rows of 5, 3 of 7
    >>> layout.axes
    {('attention_mask',): ('row', None, None, 'place')}
    >>> layout.pick(("attention_mask",), torch.ones(4, 1, 1, 9), torch.tensor([0, 3]), 6, whole=(4, 9)).shape
    torch.Size([2, 1, 1, 6])
    """

    axes: dict[tuple[Any, ...], tuple[str | None, ...]] = field(default_factory=dict)

    def note(self, name: tuple[Any, ...], first: Any, second: Any) -> None:
        """Learn from what an argument was in the two forwards."""
        if isinstance(first, tuple):
            for k, (a, b) in enumerate(zip(first, second, strict=True)):
                self.note((*name, k), a, b)
        elif isinstance(first, Tensor):
            kinds = dict(zip(zip(*_SIZES, strict=True), (ROW, PLACE), strict=True))
            self.axes[name] = tuple(kinds.get(sizes) for sizes in zip(first.shape, second.shape, strict=True))

    def pick(self, name: tuple[Any, ...], value: Any, rows: Tensor | None, length: int, whole: tuple[int, int]) -> Any:
        """An argument for some rows and their first ``length`` tokens; what is no tensor passes.

        An argument that the model did not have when it was watched (position ids, say) is judged by its sizes;
        ``whole`` is the number of rows and tokens of the batch.
        """
        if isinstance(value, tuple):
            return tuple(self.pick((*name, k), v, rows, length, whole) for k, v in enumerate(value))
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        axes = self.axes.get(name)
        if axes is None or len(axes) != value.dim():
            here = [PLACE if size == whole[1] else None for size in value.shape]
            axes = (ROW if value.shape[0] == whole[0] else here[0], *here[1:])
        if rows is not None and axes[0] == ROW and value.shape[0] == whole[0]:
            value = value.index_select(0, rows)
        if length < whole[1]:
            for axis, kind in enumerate(axes):
                if kind == PLACE and value.shape[axis] == whole[1]:
                    value = value.narrow(axis, 0, length)
        return value


def encoder_in(model: Any) -> Any:
    """The encoder that a module is or has: the first transformers model in it that cannot generate; None without one.

    Examples
    --------
    >>> from torch import nn
    >>> from transformers import BertConfig, BertModel
    >>> bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...                             intermediate_size=8))
    >>> encoder_in(nn.ModuleDict({"encoder": bert})) is bert, encoder_in(nn.Linear(2, 2))
    (True, None)
    """
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return None
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None or found.can_generate() or getattr(found.config, "is_decoder", False):
        return None
    return getattr(found, found.base_model_prefix, found)


def discover_encoder(model: Any, tokens: bool = False) -> EncoderStructure:
    """Find layers, logits and the axes of arguments of a stock encoder.

    Parameters
    ----------
    model : nn.Module
        A transformers encoder, bare or with a classification or regression head; or a module that calls one and whose
        ``forward(input_ids, attention_mask)`` returns logits [B, C].
    tokens : bool, default False
        The logits are those of every token, [B, S, C].

    Returns
    -------
    EncoderStructure

    Raises
    ------
    ValueError
        Where a part is missing or the model works in another way; one sentence says which.

    Examples
    --------
    >>> from transformers import AlbertConfig, AlbertForSequenceClassification
    >>> config = AlbertConfig(vocab_size=64, embedding_size=8, hidden_size=16, intermediate_size=32,
    ...                       num_hidden_layers=12, num_attention_heads=2, num_labels=3)
    >>> found = discover_encoder(AlbertForSequenceClassification(config).eval())
    >>> len(found.layers), len(set(found.layers)), found.classes
    (12, 1, 3)
    """
    encoder, name = encoder_in(model), type(model).__name__
    if encoder is None:
        raise ValueError(f"attach: expected an encoder or a module that has one, got {name}")
    attention = encoder.config._attn_implementation
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attach: expected an encoder with {' or '.join(ATTENTIONS)} attention, whose rows lie apart, "
            f"got {attention} in {name}: call set_attn_implementation('sdpa')"
        )
    if encoder.config.is_encoder_decoder and hasattr(encoder, "decoder"):
        raise ValueError(f"attach: expected an encoder alone, got an encoder and a decoder in {name}")
    stack = _stack(encoder, name)
    first, second = (_watch(model, encoder, stack, tokens, *size)[0] for size in _SIZES)
    layers = tuple(call.module for call in first.calls)
    if len(layers) < 2:
        raise ValueError(f"attach: expected at least two encoder layers, got {len(layers)} in {name}")
    _check_calls(first.calls, _SIZES[0], name)
    layout = Layout()
    for a, b in zip(first.calls, second.calls, strict=True):
        for argument in a.arguments:
            layout.note((argument,), a.arguments[argument], b.arguments[argument])
    # What the model does between two layers is done before the second one runs, and so before its entry is judged.
    apart = [i - 1 for i in range(1, len(layers)) if first.calls[i].hidden is not first.calls[i - 1].output]
    output = classes = None
    if model is not encoder:
        output, classes = first.output, first.logits.shape[-1]
    earliest = max(apart, default=0)
    with evaluating(model):
        _check_alone(second.calls[earliest + 1 :], layout, _SIZES[1], name)
    return EncoderStructure(
        model, encoder, layers, earliest, output, classes, _longest(encoder), layout, tokens, tuple(apart)
    )


@dataclass
class _Call:
    """One call of a layer."""

    module: nn.Module
    hidden: Tensor
    arguments: dict[str, Any]
    output: Tensor
    beside: tuple[Any, ...]  # what else the layer returned


@dataclass
class _Run:
    """One forward of the model."""

    calls: list[_Call]
    logits: Tensor
    output: nn.Module | None


def _stack(encoder: Any, name: str) -> list[nn.Module]:
    """The modules of the shallowest, then largest list of modules."""
    lists = [(path.count("."), m) for path, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"attach: expected an encoder with a stack of layers, got {name}")
    return list(min(lists, key=lambda found: (found[0], -sum(p.numel() for p in found[1].parameters())))[1])


@torch.no_grad()
def _watch(
    model: Any, encoder: Any, stack: list[nn.Module], tokens: bool, batch: int, length: int
) -> tuple[_Run, Tensor]:
    """Run rows of which the last one is padded; the mask comes back as well."""
    calls: list[_Call] = []
    outputs: list[tuple[nn.Module, Any]] = []
    entered: list[nn.Module] = []

    def layer_called(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden, arguments = named(parameters_of(module), args, kwargs)
        beside = tuple(output[1:]) if isinstance(output, tuple) else ()
        calls.append(_Call(module, hidden, arguments, first_tensor(output), beside))

    def called(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((module, output))

    def encoder_called(module: nn.Module, args: Any) -> None:
        entered.append(module)

    config, within = encoder.config, set(encoder.modules())
    handles = [m.register_forward_hook(layer_called, with_kwargs=True) for m in dict.fromkeys(stack)]
    handles.append(encoder.register_forward_pre_hook(encoder_called))
    handles += [m.register_forward_hook(called) for m in model.modules() if m is not model and m not in within]
    device, name = next(encoder.parameters()).device, type(model).__name__
    with evaluating(model):
        try:
            ids = torch.full((batch, length), ((getattr(config, "pad_token_id", None) or 0) + 1) % config.vocab_size)
            mask = torch.ones_like(ids)
            mask[-1, -PADDING:] = 0
            out = model(input_ids=ids.to(device), attention_mask=mask.to(device))
        except Exception as reason:  # whatever comes of a model that is called in another way
            raise ValueError(
                f"attach: expected a model of texts, called with input_ids and attention_mask [{batch}, {length}], "
                f"got {told(reason)} in {name}"
            ) from reason
        finally:
            for handle in handles:
                handle.remove()
    if len(entered) != 1:
        raise ValueError(f"attach: expected {name} to call its encoder once in a forward, got {len(entered)} calls")
    if model is encoder:
        return _Run(calls, first_tensor(out), None), mask.to(device)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    rows = (batch, length) if tokens else (batch,)
    if not isinstance(logits, Tensor) or logits.dim() != len(rows) + 1 or logits.shape[:-1] != rows:
        what = (
            f"every token from {name}, [{batch}, {length}, C]"
            if tokens
            else f"one row a text from {name}, [{batch}, C]"
        )
        raise ValueError(f"attach: expected logits of {what}, got something else")
    makers = [m for m, o in outputs if isinstance(o, Tensor) and o.shape == logits.shape and torch.equal(o, logits)]
    if not makers:
        raise ValueError(f"attach: expected the logits of {name} to be what one of its modules returns, found none")
    return _Run(calls, logits, makers[-1]), mask.to(device)


def _check_calls(calls: list[_Call], size: tuple[int, int], name: str) -> None:
    """What a layer takes are states of rows and tokens, and nothing that another layer hands over beside them."""
    for i, call in enumerate(calls):
        shape = list(getattr(call.hidden, "shape", ()))
        if shape[:2] != list(size) or len(shape) != 3:
            raise ValueError(
                f"attach: expected encoder layers that take [{size[0]}, {size[1]}, D], got {shape} in {name}"
            )
        made = [tensor for before in calls[:i] for tensor in before.beside if isinstance(tensor, Tensor)]
        for argument, value in call.arguments.items():
            if any(value is tensor for tensor in made):
                raise ValueError(
                    f"attach: expected encoder layers that hand on their states alone, got {argument} of layer {i} "
                    f"from an earlier one in {name}"
                )
        cache = next((c for c in CACHE_KEYWORDS if call.arguments.get(c) is not None), None)
        if cache is not None:
            raise ValueError(
                f"attach: expected encoder layers without a cache, got {cache} of layer {i} in {name} (a model that "
                "generates is attached as a causal language model, with its output embedding)"
            )


@torch.no_grad()
def _check_alone(calls: list[_Call], layout: Layout, size: tuple[int, int], name: str) -> None:
    """Each layer, run for the padded row alone and without its padding, gives what the batch gave that row."""
    last, length = size[0] - 1, size[1] - PADDING
    for call in calls:
        rows = torch.tensor([last], device=call.hidden.device)
        arguments = {k: layout.pick((k,), value, rows, length, size) for k, value in call.arguments.items()}
        layer = type(call.module).__name__
        try:
            got = first_tensor(call.module(call.hidden[rows, :length], **arguments))
        except Exception as reason:
            raise ValueError(
                f"attach: expected encoder layers that run for some rows, got {told(reason)} in {layer} of {name}"
            ) from reason
        if not near(got, call.output[rows, :length]):
            raise ValueError(
                f"attach: expected encoder layers that give a row the same without other rows and without its padding, "
                f"got another output in {layer} of {name}"
            )


def watched(structure: EncoderStructure) -> list[tuple[tuple[int, int], Tensor, list[_Call]]]:
    """For two sizes of a batch: the size, the mask [B, S], and the calls of all layers.

    Examples
    --------
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from exeunt.models import discover_encoder
    >>> from exeunt.models.encoder_structure import watched
    >>> structure = discover_encoder(BertForSequenceClassification(BertConfig(vocab_size=64, hidden_size=16,
    ...     intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)))
    >>> [(size, list(mask.shape), len(calls)) for size, mask, calls in watched(structure)]
    [((2, 5), [2, 5], 4), ((3, 7), [3, 7], 4)]
    """
    stack = list(structure.layers)
    found = []
    for size in _SIZES:
        run, mask = _watch(structure.model, structure.encoder, stack, structure.tokens, *size)
        found.append((size, mask, run.calls))
    return found


def parameters_of(module: Any) -> list[str]:
    """Names of what a module's forward takes."""
    return list(inspect.signature(module.forward).parameters)


def named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The first argument of a call, and the others by name."""
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    return arguments.pop(names[0], None), arguments


def first_tensor(output: Any) -> Any:
    """What a layer or an encoder returns first."""
    return output if isinstance(output, Tensor) else output[0]


def _longest(encoder: Any) -> int | None:
    """How many tokens a row can have: the rows of a table of positions, less those before the first position."""
    for path, module in encoder.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
