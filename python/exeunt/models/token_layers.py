"""The layers of stock encoders on tokens without padding, of which some need no output: taken apart into their modules.

A layer of which some tokens have halted needs keys and values of all tokens, and everything else for the others only.
What is called are the layer's modules, as they are; that the parts make the layer's output is checked on the model
itself, with inputs of two lengths, before any exit is put on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from exeunt import ops
from exeunt.models.encoder_structure import EncoderStructure, watched
from exeunt.models.structure import evaluating, told

__all__ = ["KINDS", "TokenLayer", "Tokens", "token_layers"]


@dataclass
class Tokens:
    """T tokens of R rows one after the other, m of which are active.

    Attributes
    ----------
    row, position : Tensor
        [T] int64: row of the batch, and position in it.
    bounds : Tensor
        [R+1] int64: tokens ``bounds[r]`` to ``bounds[r+1]`` are those of the r-th row that runs.
    active : Tensor or None
        [m] int64, ascending; None for all.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models.token_layers import Tokens
    >>> row, position = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])
    >>> tokens = Tokens(row, position, bounds=torch.tensor([0, 3, 5]), active=torch.tensor([1, 4]))
    >>> tokens.of_active(position), tokens.queries
    (tensor([1, 1]), tensor([0, 1, 2]))
    """

    row: Tensor
    position: Tensor
    bounds: Tensor
    active: Tensor | None = None

    def __post_init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is the same for all layers until tokens halt, made when it is first asked for."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def of_active(self, t: Tensor) -> Tensor:
        """Entries of the active tokens."""
        return t if self.active is None else t.index_select(0, self.active)

    @property
    def queries(self) -> Tensor:
        """[R+1] bounds of the rows among the active tokens."""
        active = self.active
        return self.bounds if active is None else self.once("queries", lambda: torch.searchsorted(active, self.bounds))

    @property
    def slot(self) -> Tensor:
        """[m] int64: the row of each active token, counted among those that run."""
        return self.once("slot", lambda: torch.repeat_interleave(self.queries.diff()))

    def padded(self) -> tuple[Tensor, Tensor]:
        """[R, K] tokens of each row, repeating its last one behind the end, and [R] lengths."""

        def make() -> tuple[Tensor, Tensor]:
            lengths = self.bounds.diff()
            at = torch.arange(int(lengths.max()), device=lengths.device)
            return self.bounds[:-1, None] + torch.minimum(at, lengths[:, None] - 1), lengths

        return self.once("padded", make)

    def near(self, reach: int) -> tuple[Tensor, Tensor]:
        """[m] first token, and one past the last, of a row within ``reach`` positions of each active token."""

        def make() -> tuple[Tensor, Tensor]:
            stride = int(self.position.max()) + 2 * reach + 2  # one ascending number for row and position
            at = self.row * stride + self.position
            mine = self.of_active(at)
            return torch.searchsorted(at, mine - reach), torch.searchsorted(at, mine + reach, right=True)

        return self.once(f"near {reach}", make)


class TokenLayer:
    """One layer in parts.

    Parameters
    ----------
    layer : nn.Module
        The stock layer.

    Examples
    --------
    >>> import torch
    >>> from exeunt.models.token_layers import TokenLayer, Tokens
    >>> class Attention(TokenLayer):
    ...     heads, head_dim = 2, 4
    ...
    ...     def keys_values(self, hidden, arguments, tokens):
    ...         return hidden.view(-1, 2, 4), hidden.view(-1, 2, 4)
    ...
    ...     def queries(self, hidden, arguments, tokens):
    ...         return hidden.view(-1, 2, 4)
    ...
    ...     def finish(self, context, hidden):
    ...         return hidden + context, hidden
    >>> tokens = Tokens(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, 2]), active=torch.tensor([1]))
    >>> Attention(None)(torch.ones(2, 8), {}, tokens)[0]
    tensor([[2., 2., 2., 2., 2., 2., 2., 2.]])
    """

    heads: int
    head_dim: int
    norm: Any = None  # what the layer applies last, None where it normalises first
    reach: int | None = None  # how far a token sees to either side, None without limit

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.head_dim**-0.5

    def keys_values(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H, Dh] of all tokens."""
        raise NotImplementedError

    def queries(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> Tensor:
        """Queries [m, H, Dh] of the active tokens, whose states [m, D] are given."""
        raise NotImplementedError

    def finish(self, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output [m, D] and what its last norm read, from attention's [m, H*Dh] and the states."""
        raise NotImplementedError

    def bias(self, q: Tensor, k: Tensor, arguments: dict[str, Any], tokens: Tokens) -> Tensor | None:
        """What is added to the scores, [m, H, K] over the tokens of each row."""
        return None

    def __call__(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Parameters
        ----------
        hidden : Tensor
            [T, D] states of all tokens.
        arguments : dict
            What the model handed to the layer beside them.
        tokens : Tokens

        Returns
        -------
        output, before : Tensor
            [m, D] of the active tokens: the layer's output, and what its last norm read.
        """
        k, v = self.keys_values(hidden, arguments, tokens)
        mine = tokens.of_active(hidden)
        q = self.queries(mine, arguments, tokens)
        bias = self.bias(q, k, arguments, tokens)
        if bias is not None:  # over the keys of a row, which have to be counted from its first
            index, lengths = tokens.padded()
            rows = tokens.once("rows", lambda: torch.arange(len(lengths), device=lengths.device))
            keys, values = k[index].transpose(1, 2), v[index].transpose(1, 2)
            out = ops.ragged_attention(
                q, keys, values, tokens.queries, rows, lengths, causal=False, scale=self.scale, bias=bias
            )
        else:  # every row, or every token where it sees its neighbourhood alone, reads its part of one row of keys
            if self.reach is None:
                indptr, start, stop = tokens.queries, tokens.bounds[:-1], tokens.bounds[1:]
            else:
                start, stop = tokens.near(self.reach)
                indptr = tokens.once("each", lambda: torch.arange(len(start) + 1, device=start.device))
            rows = tokens.once(f"zeros {self.reach}", lambda: torch.zeros_like(start))
            keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
            out = ops.ragged_attention(
                q, keys, values, indptr, rows, stop, kv_start=start, causal=False, scale=self.scale
            )
        return self.finish(out.flatten(1), mine)

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim))


class BertLayer(TokenLayer):
    """BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA: attention, norm, feed-forward, norm."""

    names = ("query", "key", "value")

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.attention = layer.attention.self
        self.query, self.key, self.value = (getattr(self.attention, name) for name in self.names)
        self.heads, self.head_dim = self.attention.num_attention_heads, self.attention.attention_head_size
        self.norm = layer.output.LayerNorm

    def keys_values(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Two products."""
        return self._split(self.key(hidden)), self._split(self.value(hidden))

    def queries(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> Tensor:
        """One product."""
        return self._split(self.query(hidden))

    def finish(self, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and norm, feed-forward and norm."""
        layer = self.layer
        attended = layer.attention.output(context, hidden)
        before = layer.output.dense(layer.intermediate(attended)).add_(attended)
        return self.norm(before), before


class DebertaLayer(BertLayer):
    """DeBERTa v2 and v3: scores have terms of relative positions, which depend on query and key."""

    names = ("query_proj", "key_proj", "value_proj")

    @property
    def scale(self) -> float:
        """The terms share the variance."""
        kinds = sum(kind in self.attention.pos_att_type for kind in ("c2p", "p2c"))
        return (self.head_dim * (1 + kinds)) ** -0.5

    def bias(self, q: Tensor, k: Tensor, arguments: dict[str, Any], tokens: Tokens) -> Tensor | None:
        """Content to position and position to content, for the active queries alone."""
        own, table = self.attention, arguments.get("rel_embeddings")
        if not own.relative_attention or table is None:
            return None
        span = own.pos_ebd_size
        table = table[: 2 * span]

        def distances() -> Tensor:
            relative = arguments["relative_pos"]
            relative = relative.reshape(-1, *relative.shape[-2:])[0].long()
            keys = tokens.padded()[0][tokens.slot]
            return relative[tokens.of_active(tokens.position)[:, None], tokens.position[keys]]  # [m, K]

        distance = tokens.once("distance", distances)
        total: Tensor | None = None
        if "c2p" in own.pos_att_type:
            of_keys = self._split((own.key_proj if own.share_att_key else own.pos_key_proj)(table))
            scores = torch.einsum("mhd,phd->mhp", q, of_keys)
            at = (distance + span).clamp(0, 2 * span - 1)[:, None].expand(-1, self.heads, -1)
            total = scores.gather(2, at)
        if "p2c" in own.pos_att_type:
            of_queries = self._split((own.query_proj if own.share_att_key else own.pos_query_proj)(table))
            scores = torch.einsum("khd,phd->kph", k, of_queries)
            keys = tokens.padded()[0][tokens.slot]
            found = scores[keys, (distance + span).clamp(0, 2 * span - 1)].transpose(1, 2)  # [m, K, H] -> [m, H, K]
            total = found if total is None else total + found
        return None if total is None else total * self.scale


class DistilBertLayer(TokenLayer):
    """DistilBERT: as BERT, under other names."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        own = self.attention = layer.attention
        self.heads = own.n_heads
        self.head_dim = own.dim // own.n_heads
        self.norm = layer.output_layer_norm

    def keys_values(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Two products."""
        return self._split(self.attention.k_lin(hidden)), self._split(self.attention.v_lin(hidden))

    def queries(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> Tensor:
        """One product."""
        return self._split(self.attention.q_lin(hidden))

    def finish(self, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and norm, feed-forward and norm."""
        layer = self.layer
        attended = layer.sa_layer_norm(layer.attention.out_lin(context) + hidden)
        before = layer.ffn.ff_chunk(attended) + attended
        return self.norm(before), before


class ModernBertLayer(TokenLayer):
    """ModernBERT: normalises first, turns queries and keys by position, sees its neighbourhood in most layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        own = self.attention = layer.attn
        self.head_dim = own.head_dim
        self.width = own.Wqkv.out_features // 3
        self.heads = self.width // self.head_dim
        sides = getattr(own, "local_attention", None)
        if sides is not None:  # transformers 4
            self.reach = None if sides[0] < 0 else sides[0]
        else:
            self.reach = None if own.sliding_window is None else own.sliding_window - 1

    def _part(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        """Some of queries, keys and values, which are stored as one product."""
        whole = self.attention.Wqkv
        bias = None if whole.bias is None else whole.bias[begin * self.width : end * self.width]
        return self._split(F.linear(hidden, whole.weight[begin * self.width : end * self.width], bias))

    def _turned(self, t: Tensor, arguments: dict[str, Any], tokens: Tokens, active: bool) -> Tensor:
        cos, sin = self._angles(arguments, tokens)
        if active:
            cos, sin = tokens.of_active(cos), tokens.of_active(sin)
        a, b = t.float().chunk(2, -1)
        return (t.float() * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]).to(t.dtype)

    def _angles(self, arguments: dict[str, Any], tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, Dh] of all tokens."""
        given = arguments.get("position_embeddings")

        def at(t: Tensor) -> Tensor:
            return t.expand(int(tokens.row.max()) + 1, *t.shape[1:])[tokens.row, tokens.position]

        if given is not None:
            return tokens.once(f"angles {id(given)}", lambda: (at(given[0]), at(given[1]), given))[:2]
        positions = arguments.get("position_ids")
        places = tokens.position if positions is None else at(positions)
        weight = self.attention.Wqkv.weight
        name = f"angles of {id(self.attention.rotary_emb)}"
        cos, sin = tokens.once(name, lambda: self.attention.rotary_emb(weight, position_ids=places[None]))
        return cos[0], sin[0]

    def keys_values(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> tuple[Tensor, Tensor]:
        """One product."""
        both = self._part(self.layer.attn_norm(hidden), 1, 3)
        k, v = both[:, : self.heads], both[:, self.heads :]
        return self._turned(k, arguments, tokens, False), v

    def queries(self, hidden: Tensor, arguments: dict[str, Any], tokens: Tokens) -> Tensor:
        """One product."""
        return self._turned(self._part(self.layer.attn_norm(hidden), 0, 1), arguments, tokens, True)

    def finish(self, context: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection, feed-forward."""
        layer = self.layer
        attended = hidden + layer.attn.Wo(context)
        out = attended + layer.mlp(layer.mlp_norm(attended))
        return out, out


#: By class of the stock layer.
KINDS: dict[str, type[TokenLayer]] = {
    "BertLayer": BertLayer,
    "RobertaLayer": BertLayer,
    "XLMRobertaLayer": BertLayer,
    "CamembertLayer": BertLayer,
    "ElectraLayer": BertLayer,
    "DebertaV2Layer": DebertaLayer,
    "TransformerBlock": DistilBertLayer,
    "ModernBertEncoderLayer": ModernBertLayer,
}


@torch.no_grad()
def token_layers(structure: EncoderStructure) -> list[TokenLayer]:
    """The layers of an encoder in parts, in the order of their calls, checked against the layers themselves.

    Parameters
    ----------
    structure : EncoderStructure
        Of a tagger.

    Raises
    ------
    ValueError
        Where the layers are of no known kind, or do something else than their parts: one sentence.

    Examples
    --------
    >>> from transformers import BertConfig, BertForTokenClassification
    >>> from exeunt.models import discover_encoder
    >>> config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_labels=3,
    ...                     intermediate_size=32)
    >>> [layer.heads for layer in token_layers(discover_encoder(BertForTokenClassification(config), tokens=True))]
    [2, 2, 2]
    """
    name = type(structure.model).__name__
    unknown = [type(layer).__name__ for layer in structure.layers if type(layer).__name__ not in KINDS]
    if unknown:
        raise ValueError(
            f"attach: words can leave on their own in layers of kind {', '.join(KINDS)}, got {unknown[0]} in {name}: "
            "exits of whole rows work there"
        )
    try:
        layers = [KINDS[type(layer).__name__](layer) for layer in structure.layers]
        with evaluating(structure.model):
            for size, mask, calls in watched(structure):
                tokens, counted = _tokens(mask), mask.reshape(-1).nonzero()[:, 0]
                for parts, call in zip(layers, calls, strict=True):
                    out, _ = parts(call.hidden.flatten(0, 1)[counted], call.arguments, tokens)
                    want = call.output.flatten(0, 1)[counted]
                    room = 64 * torch.finfo(want.dtype).eps * float(want.abs().max().clamp_min(1))
                    if not float((out - want).abs().max()) <= room:
                        raise ValueError(f"difference {float((out - want).abs().max()):.1e} with {size[0]} rows")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as reason:
        raise ValueError(
            f"attach: words cannot leave on their own in {name}, whose layers do not equal their known parts "
            f"({told(reason)}); exits of whole rows work there"
        ) from reason
    return layers


def _tokens(mask: Tensor) -> Tokens:
    """Tokens of a mask [B, S], every row with one at least."""
    row, position = (mask != 0).nonzero(as_tuple=True)
    counts = (mask != 0).sum(1)
    return Tokens(row, position, F.pad(counts.cumsum(0), (1, 0)))
