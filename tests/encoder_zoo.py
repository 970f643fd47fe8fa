"""Tiny random encoders of every architecture that exits are tested on, rows for them, and what to expect of exits."""

from __future__ import annotations

import torch
import transformers as T

from exeunt.models import discover_encoder

CLASSES = 3
COMMON = dict(
    vocab_size=199, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
    max_position_embeddings=80, num_labels=CLASSES, pad_token_id=0,
)  # fmt: skip
ROBERTA = {**COMMON, "pad_token_id": 1}
DEBERTA = {
    **COMMON, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "position_biased_input": False,
}  # fmt: skip
ZOO = {
    "bert": ("Bert", COMMON),
    "roberta": ("Roberta", ROBERTA),
    "albert": ("Albert", {**COMMON, "embedding_size": 16, "num_hidden_layers": 12}),
    "distilbert": (
        "DistilBert",
        dict(vocab_size=199, dim=32, hidden_dim=48, n_layers=6, n_heads=4, num_labels=CLASSES,
             max_position_embeddings=80),
    ),
    "electra": ("Electra", {**COMMON, "embedding_size": 16}),
    "deberta-v2": ("DebertaV2", DEBERTA),
    "modernbert": ("ModernBert", {**COMMON, "local_attention": 16, "global_attn_every_n_layers": 3}),
    "xlm-roberta": ("XLMRoberta", ROBERTA),
    "camembert": ("Camembert", ROBERTA),
    "mpnet": ("MPNet", ROBERTA),
}  # fmt: skip


def build(name, task="ForSequenceClassification", seed=0, **settings):
    """A random model whose states differ enough from row to row and layer to layer."""
    family, config = ZOO[name]
    extra = {"reference_compile": False} if name == "modernbert" and T.__version__ < "5" else {}
    torch.manual_seed(seed)
    model = getattr(T, family + task)(getattr(T, family + "Config")(**{**config, **extra, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def rows(batch, longest=40, seed=0, shortest=3):
    """Rows of random length, padded on the right; one of them is the longest."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (batch,), generator=g)
    lengths[batch // 2] = longest
    ids = torch.randint(3, 199, (batch, longest), generator=g)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return ids, mask, lengths


@torch.no_grad()
def states_of(model, ids, mask):
    """Output of every layer at full depth, [B, S, D] each, from hooks on the layers of an unattached model."""
    structure = discover_encoder(model)
    calls, handles = [], []
    for layer in dict.fromkeys(structure.layers):

        def entered(module, args, kwargs):
            calls.append(args[0] if args else next(iter(kwargs.values())))

        handles.append(layer.register_forward_pre_hook(entered, with_kwargs=True))
    try:
        out = model(input_ids=ids, attention_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return calls[1:], out  # what enters a layer is what left the one before; the last one's is not needed


def thresholds(scores, share=0.3):
    """For each exit a value that some share of the rows reaches, in the middle of a gap between two scores."""
    values = []
    for column in scores.T:
        ordered = column.sort(descending=True).values
        k = max(1, int(share * len(ordered)))
        gaps = ordered[k - 1 : k + 4] - ordered[k : k + 5][: len(ordered[k - 1 : k + 4])]
        at = k - 1 + int(gaps.argmax())
        values.append(float((ordered[at] + ordered[at + 1]) / 2))
    return tuple(values)


def leaves_at(scores, values):
    """Index of the first exit whose threshold each row reaches; the number of exits where there is none."""
    reached = scores >= torch.tensor(values)
    return torch.where(reached.any(1), reached.int().argmax(1), scores.shape[1])
