"""Exit heads: the few trained parameters that a model needs at its exits.

The state after an early layer does not yet lie where the model's last norm and head expect it. A `Translator` or a
`DecoderLayer` moves it there, a `Probe` says how far to trust the result. What one exit has is an `ExitHead`; a model's
exits are `ExitHeads`, which is what gets saved. An exit's logits are always ``head(norm(exit_head.state(h)))`` with
the model's own head and norm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exeunt import files

_Own = TypeVar("_Own", bound=nn.Module)

__all__ = ["CandidateProbe", "DecoderLayer", "ExitHead", "ExitHeads", "Probe", "Translator", "fingerprint"]

FORMAT = "exeunt.heads"
FORMAT_VERSION = "1"


def rms_normalized(h: Tensor, eps: float = 1e-6) -> Tensor:
    """`h` in float32 with a root mean square of one along its last axis."""
    h = h.float()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


class Translator(nn.Module):
    """Residual MLP that moves an exit state to where the model's last norm and head expect it.

    Computes ``h + down(silu(up(rms(h) * weight)))`` in the dtype of its parameters, with the root mean
    square taken in float32; input and output are float tensors of shape [..., D] and of one dtype. `down`
    starts at zero, so a fresh translator is the identity. The tuned lens (Belrose et al., 2023,
    arXiv:2303.08112) trains an affine translator per layer; this one has a hidden layer.

    Parameters
    ----------
    hidden_size : int
        Size D of the model's hidden states.
    width : int, optional
        Size of the inner layer. Default: ``2 * hidden_size``.
    eps : float, default 1e-6
        Added to the mean square before its root is taken.

    Examples
    --------
    >>> import torch
    >>> from exeunt.heads import Translator
    >>> h = torch.randn(2, 3, 64)
    >>> torch.equal(Translator(64)(h), h)
    True
    """

    def __init__(self, hidden_size: int, width: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.width = 2 * hidden_size if width is None else width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.up = nn.Linear(hidden_size, self.width, bias=False)
        self.down = nn.Linear(self.width, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor) -> Tensor:
        """Translate `h`."""
        x = rms_normalized(h, self.eps).to(self.weight.dtype) * self.weight
        return h + self.down(F.silu(self.up(x))).to(h.dtype)


class DecoderLayer(nn.Module):
    """Decoder layer of an exit's own, in the place of a translator: it also looks at the tokens before.

    Balcony's exits (Jamialahmadi et al., 2025, arXiv:2503.05005): causal attention with rotary positions and a gated
    MLP, each behind an RMS norm and added to what came in, as Llama's layers are. Both output products start at zero,
    so a fresh layer is the identity. Input and output are float tensors of shape [..., S, D] and of one dtype, whole
    sequences from their first token on: it keeps no keys and values, so it serves training and teacher-forced
    evaluation, and `attach` refuses it.

    Parameters
    ----------
    hidden_size : int
        Size D of the model's hidden states.
    heads : int
        Of the attention; D must be a multiple of them.
    key_value_heads : int, optional
        Default: as many as `heads`.
    width : int, optional
        Size of the MLP's inner layer. Default: ``4 * hidden_size``.
    theta : float, default 10000.0
        Base of the rotary positions.
    eps : float, default 1e-6
        Added to the mean squares before their roots are taken.

    Examples
    --------
    >>> import torch
    >>> from exeunt.heads import DecoderLayer
    >>> h = torch.randn(2, 5, 64)
    >>> torch.equal(DecoderLayer(64, heads=4)(h), h)
    True
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        key_value_heads: int | None = None,
        width: int | None = None,
        theta: float = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.hidden_size, self.heads, self.theta, self.eps = hidden_size, heads, theta, eps
        self.key_value_heads = heads if key_value_heads is None else key_value_heads
        self.width = 4 * hidden_size if width is None else width
        size, few = hidden_size // heads, self.key_value_heads
        if size * heads != hidden_size or size % 2 or heads % few:
            raise ValueError(
                f"heads must divide {hidden_size} into even parts and be a multiple of key_value_heads, "
                f"got {heads} and {few}"
            )
        self.weight = nn.Parameter(torch.ones(2, hidden_size))  # of the norms before attention and MLP
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, few * size, bias=False)
        self.value = nn.Linear(hidden_size, few * size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, self.width, bias=False)
        self.up = nn.Linear(hidden_size, self.width, bias=False)
        self.down = nn.Linear(self.width, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor) -> Tensor:
        """The layer's output for sequences `h`."""
        x = rms_normalized(h, self.eps).to(self.weight.dtype) * self.weight[0]
        # [..., S, heads * size] -> [..., heads, S, size]
        q, k, v = (p(x).unflatten(-1, (-1, self.hidden_size // self.heads)).transpose(-3, -2)
                   for p in (self.query, self.key, self.value))  # fmt: skip
        attended = F.scaled_dot_product_attention(
            self._rotated(q), self._rotated(k), v, is_causal=True, enable_gqa=self.heads != self.key_value_heads
        )
        h = h + self.out(attended.transpose(-3, -2).flatten(-2)).to(h.dtype)
        x = rms_normalized(h, self.eps).to(self.weight.dtype) * self.weight[1]
        return h + self.down(F.silu(self.gate(x)) * self.up(x)).to(h.dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        """Queries or keys [..., S, size] turned by their positions; angles in float32."""
        half = x.shape[-1] // 2
        frequency = self.theta ** -(torch.arange(half, device=x.device) / half)
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
        first, second = x.float().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Probe(nn.Module):
    """Probe for the probability that the exit's token (or label) is that of full depth: linear, or with a hidden layer.

    Reads the raw exit state, before any translator: a decision costs no pass over the vocabulary. Input is a
    float tensor of shape [..., D], output a float32 tensor of shape [...]; a fresh probe answers 0.5.
    Parameters and arithmetic stay float32 when the probe or a module around it is cast: a threshold near 1
    needs more than the eight bits of bfloat16.

    Parameters
    ----------
    hidden_size : int
        Size D of the model's hidden states.
    eps : float, default 1e-6
        Added to the mean square before its root is taken.

    Examples
    --------
    >>> import torch
    >>> from exeunt.heads import Probe
    >>> Probe(64).bfloat16()(torch.randn(3, 64))
    tensor([0.5000, 0.5000, 0.5000], grad_fn=<SigmoidBackward0>)
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, width: int | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.width = width
        self.hidden = None if width is None else nn.Linear(hidden_size, width, dtype=torch.float32)
        self.weight = nn.Parameter(torch.zeros(width or hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, h: Tensor) -> Tensor:
        """Probability for each state in `h`."""
        return torch.sigmoid(self.logit(h))

    def logit(self, h: Tensor) -> Tensor:
        """Log-odds for each state in `h`."""
        x = rms_normalized(h, self.eps)
        return (x if self.hidden is None else F.relu(self.hidden(x))) @ self.weight + self.bias

    def _apply(self: _Own, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Own:
        # `.to()`, `.half()` and `.cuda()` of any module around this one end here: follow the device only.
        def keep_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == torch.float32 else t.to(moved.device)

        nn.Module._apply(self, keep_float32, recurse)
        return self


class CandidateProbe(nn.Module):
    """SpecEE's predictor: whether an exit says what full depth will, from what it says of a few candidates.

    Reads :func:`exeunt.candidates.features`: linear, relu, linear, sigmoid. Stays float32 when it is cast.

    Parameters
    ----------
    count : int, default 4
        Candidates.
    width : int, default 512
        Of the hidden layer.

    Examples
    --------
    >>> import torch
    >>> from exeunt.heads import CandidateProbe
    >>> CandidateProbe()(torch.zeros(2, 12)).shape
    torch.Size([2])
    """

    def __init__(self, count: int = 4, width: int = 512) -> None:
        super().__init__()
        self.count, self.width = count, width
        self.hidden = nn.Linear(3 * count, width, dtype=torch.float32)
        self.out = nn.Linear(width, 1, dtype=torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        """Probability [...] for features [..., 3 * count]."""
        return torch.sigmoid(self.logit(features))

    def logit(self, features: Tensor) -> Tensor:
        """Log-odds."""
        return self.out(F.relu(self.hidden(features)))[..., 0]

    _apply = Probe._apply


class ExitHead(nn.Module):
    """What one exit has of its own: a translator, a probe, a decoder layer; any of them or none.

    Parameters
    ----------
    translator : Translator, optional
        Applied before the model's last norm and head; without one the state is used as it is.
    probe : Probe, optional
        Confidence that costs no pass over the vocabulary.
    layer : DecoderLayer, optional
        Applied before the translator; then states come as whole sequences, [..., S, D].
    candidates : CandidateProbe, optional
        Confidence that reads a few words of the vocabulary.

    Examples
    --------
    >>> import torch
    >>> from exeunt.heads import ExitHead
    >>> h = torch.randn(4, 64)
    >>> ExitHead().state(h) is h
    True
    """

    def __init__(
        self,
        translator: Translator | None = None,
        probe: Probe | None = None,
        layer: DecoderLayer | None = None,
        candidates: CandidateProbe | None = None,
    ) -> None:
        super().__init__()
        self.translator, self.probe, self.layer, self.candidates = translator, probe, layer, candidates

    def state(self, h: Tensor) -> Tensor:
        """The state that goes into the model's last norm: shape [..., D] and dtype as `h`."""
        if self.layer is not None:
            h = self.layer(h)
        return h if self.translator is None else self.translator(h)


# What it takes to build each part of an ExitHead again; stored in saved files.
_PARTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "translator": (Translator, ("hidden_size", "width", "eps")),
    "probe": (Probe, ("hidden_size", "eps", "width")),
    "candidates": (CandidateProbe, ("count", "width")),
    "layer": (DecoderLayer, ("hidden_size", "heads", "key_value_heads", "width", "theta", "eps")),
}


class ExitHeads(nn.Module):
    """The exit heads of one model, by exit layer.

    Read like a mapping; iteration goes over the exit layers in ascending order. An exit at layer e takes
    the state after the layer of 0-based index e, so layers 0 to e have run.

    Parameters
    ----------
    heads : Mapping[int, ExitHead]
        Exit layer, 0-based, to its head.
    metadata : dict[str, str], optional
        Free text kept with the heads: training data and its licence, steps, held-out figures.

    Examples
    --------
    >>> from exeunt.heads import ExitHead, ExitHeads, Probe, Translator
    >>> heads = ExitHeads({12: ExitHead(Translator(64)), 6: ExitHead(probe=Probe(64))})
    >>> list(heads), 12 in heads, heads[6].translator
    ([6, 12], True, None)
    """

    def __init__(self, heads: Mapping[int, ExitHead], metadata: dict[str, str] | None = None) -> None:
        super().__init__()
        if any(layer < 0 for layer in heads):
            raise ValueError(f"exit layers must be 0 or larger, got {sorted(heads)}")
        self.metadata = dict(metadata or {})
        self._heads = nn.ModuleDict({str(layer): heads[layer] for layer in sorted(heads)})

    def __getitem__(self, layer: int) -> ExitHead:
        if layer not in self:
            raise KeyError(f"no exit head at layer {layer}, there are heads at {list(self)}")
        return cast(ExitHead, self._heads[str(layer)])

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and str(layer) in self._heads

    def __iter__(self) -> Iterator[int]:
        return map(int, self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def save(self, path: str | os.PathLike[str], config: Any) -> None:
        """Write the heads to a safetensors file, in the dtypes that they have, completely or not at all.

        Parameters
        ----------
        path : path
        config : transformers.PretrainedConfig
            Configuration of the model that the heads belong to; its `fingerprint` goes into the file.
        """
        safetensors = _safetensors()
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": json.dumps(fingerprint(config)),
            "heads": json.dumps({str(layer): _structure(self[layer]) for layer in self}),
            "metadata": json.dumps(self.metadata),
        }
        # Copies, since the format knows no tensor that several exits share.
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in self._heads.state_dict().items()}
        files.write(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any) -> ExitHeads:
        """Read heads that `save` wrote, on the CPU and as stored; ``.to(model.dtype)`` casts them.

        Parameters
        ----------
        path : path
        config : transformers.PretrainedConfig
            Configuration of the model that the heads are wanted for.

        Raises
        ------
        ValueError
            If the file holds no exit heads, or those of a model with another `fingerprint`.
        """
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(path, "pt") as file:
                stored = file.metadata() or {}
        except safetensors.SafetensorError:
            stored = {}
        if (stored.get("format"), stored.get("version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{path} is not an exeunt heads file of version {FORMAT_VERSION}")
        expected, got = json.loads(stored["model"]), fingerprint(config)
        differing = [name for name in expected | got if expected.get(name) != got.get(name)]
        if differing:
            fields = "; ".join(f"{name} {expected.get(name)}, got {got.get(name)}" for name in differing)
            raise ValueError(f"{path} belongs to another model: expected {fields}")
        heads = {int(layer): _build(parts) for layer, parts in json.loads(stored["heads"]).items()}
        loaded = cls(heads, json.loads(stored["metadata"]))
        # Assigning, not copying, keeps the stored dtypes.
        loaded._heads.load_state_dict(safetensors.torch.load_file(path), assign=True)
        return loaded


def fingerprint(config: Any) -> dict[str, int | str]:
    """The fields of a model configuration that must agree for exit heads to fit.

    These are `model_type`, `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size` and, where
    there is one, `intermediate_size`, read as plain attributes of `config`: nothing that depends on dtype,
    device or the version of transformers.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from exeunt.heads import fingerprint
    >>> config = SimpleNamespace(model_type="llama", hidden_size=64, num_hidden_layers=4,
    ...                          num_attention_heads=4, vocab_size=100)
    >>> fingerprint(config) == vars(config)
    True
    """
    required = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    fields: dict[str, int | str] = {name: getattr(config, name) for name in required}
    if getattr(config, "intermediate_size", None) is not None:
        fields["intermediate_size"] = config.intermediate_size
    return fields


def _structure(head: ExitHead) -> dict[str, dict[str, Any]]:
    return {
        name: {option: getattr(part, option) for option in options}
        for name, (_, options) in _PARTS.items()
        if (part := getattr(head, name)) is not None
    }


def _build(parts: dict[str, dict[str, Any]]) -> ExitHead:
    return ExitHead(**{name: _PARTS[name][0](**options) for name, options in parts.items()})


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saved exit heads need safetensors: pip install exeunt[hf]") from error
    return safetensors
