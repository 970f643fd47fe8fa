"""A tiny random model of every family that exeunt says it works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

LAYERS, VOCABULARY, BATCH, WIDTH = 5, 97, 3, 32


@dataclass(frozen=True)
class Family:
    """How to make a tiny model; ``sizes`` says which names its configuration has for them."""

    kind: str
    sizes: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    head: str = "ForCausalLM"


_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
_SIZES = {
    "llama": dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **_IDS,
    ),
    "gpt2": dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, **_IDS),
    "t5": dict(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_decoder_layers=LAYERS,
        num_heads=4, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0, dropout_rate=0.0,
    ),
    "bart": dict(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
        decoder_start_token_id=2, forced_eos_token_id=None, **_IDS,
    ),
    "none": {},
}  # fmt: skip
_NEOX = {k: v for k, v in _SIZES["llama"].items() if k != "num_key_value_heads"}
_OPT = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    max_position_embeddings=128, **_IDS,
)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)
_FALCON = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, **_IDS)
_WHISPER = dict(num_mel_bins=8, max_source_positions=12, max_target_positions=64, begin_suppress_tokens=None)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral, sliding window": Family("Mistral", options=dict(sliding_window=8)),
    "mixtral": Family("Mixtral", options=dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", options=dict(head_dim=8)),
    "qwen3_moe": Family("Qwen3Moe", options=dict(head_dim=8, **_EXPERTS)),
    "gemma": Family("Gemma", options=dict(head_dim=8)),
    "gemma2": Family("Gemma2", options=dict(head_dim=8, sliding_window=8, final_logit_softcapping=5.0)),
    "gemma3, text": Family("Gemma3", options=dict(head_dim=8, sliding_window=8)),
    "phi": Family("Phi"),
    "phi3": Family("Phi3"),
    "gpt2": Family("GPT2", "gpt2", head="LMHeadModel"),
    "gpt_neo": Family("GPTNeo", "none", dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=LAYERS, num_heads=4, window_size=8, **_IDS,
        attention_types=[[["global"], LAYERS]], max_position_embeddings=128)),
    "gpt_neo, local attention": Family("GPTNeo", "none", dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=LAYERS, num_heads=4, window_size=8, **_IDS,
        attention_types=[[["global", "local"], 2], [["global"], 1]], max_position_embeddings=128)),
    "gpt_neox": Family("GPTNeoX", "none", _NEOX),
    "gptj": Family("GPTJ", "gpt2", dict(rotary_dim=4)),
    "opt": Family("OPT", "none", dict(word_embed_proj_dim=WIDTH, **_OPT)),
    "opt, post norm": Family("OPT", "none", dict(word_embed_proj_dim=16, do_layer_norm_before=False, **_OPT)),
    "falcon, rope": Family("Falcon", "none", _FALCON),
    "falcon, alibi": Family("Falcon", "none", dict(alibi=True, parallel_attn=False, **_FALCON)),
    "bloom": Family("Bloom", "none", dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, **_IDS)),
    "mpt": Family("Mpt", "none", dict(  # as many heads as rows: only tracing tells its alibi from a batch
        vocab_size=VOCABULARY, d_model=24, n_layers=LAYERS, n_heads=BATCH, max_seq_len=128, expansion_ratio=2,
        use_cache=True)),
    "cohere": Family("Cohere", options=dict(logit_scale=0.3)),
    "cohere2": Family("Cohere2", options=dict(logit_scale=0.3, sliding_window=8)),
    "granite": Family("Granite", options=dict(logits_scaling=3.0, residual_multiplier=0.7)),
    "olmo2": Family("Olmo2"),
    "stablelm": Family("StableLm"),
    "starcoder2": Family("Starcoder2"),
    "smollm3": Family("SmolLM3"),
    "t5": Family("T5", "t5", head="ForConditionalGeneration"),
    "t5 1.1": Family("T5", "t5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
                     head="ForConditionalGeneration"),
    "mt5": Family("MT5", "t5", head="ForConditionalGeneration"),
    "bart": Family("Bart", "bart", head="ForConditionalGeneration"),
    "marian": Family("Marian", "bart", head="MTModel"),
    "whisper, decoder": Family("Whisper", "bart", _WHISPER, head="ForConditionalGeneration"),
}  # fmt: skip


def make(name: str, **options: Any) -> Any:
    """The family's model, its weights spread enough for its confidences to differ."""
    family = FAMILIES[name]
    config_class = {"Gemma3": "Gemma3Text"}.get(family.kind, family.kind) + "Config"
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {family.kind}")
    # A tied head says again what it has read; one of its own lets confidences differ.
    untied = {} if family.sizes in ("t5", "bart") else dict(tie_word_embeddings=False)
    config = getattr(transformers, config_class)(**{**untied, **_SIZES[family.sizes], **family.options, **options})
    config.eos_token_id = None
    torch.manual_seed(0)
    model = getattr(transformers, family.kind + family.head)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, 0.16)
            else:
                p.add_(torch.randn_like(p) * 0.05)
        model.get_output_embeddings().weight.mul_(4.0)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0, 0.5)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    if family.kind == "Whisper":
        settings.suppress_tokens = [0]  # its generate cuts padding off the end, and trips where nothing is left
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = config.decoder_start_token_id if config.is_encoder_decoder else None
    return model


def inputs(model: Any, batch: int = BATCH, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch for ``generate``; the second row of a decoder's prompt is padded on the left."""
    g = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "num_mel_bins"):
        return dict(input_features=torch.randn(batch, model.config.num_mel_bins, 24, generator=g))
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=g)
    mask = torch.ones_like(ids)
    if batch > 1:
        side = slice(0, 3) if not model.config.is_encoder_decoder else slice(length - 3, None)
        mask[1, side], ids[1, side] = 0, 0
    return dict(input_ids=ids, attention_mask=mask)


def generate(model: Any, given: dict[str, torch.Tensor], new: int = 12, **settings: Any) -> Any:
    """Stock generate, with logits."""
    torch.manual_seed(3)
    return model.generate(
        **given, **{"max_new_tokens": new, "do_sample": False, **settings}, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
