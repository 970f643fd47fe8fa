"""Exit heads: arithmetic, dtypes, and files that are either whole or absent."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from exeunt.heads import DecoderLayer, ExitHead, ExitHeads, Probe, Translator, fingerprint

safetensors = pytest.importorskip("safetensors.torch")


def config(**changes):
    fields = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "intermediate_size": 96,
    }
    return SimpleNamespace(**fields | changes)


@pytest.fixture
def heads():
    """Two exits with parameters unlike those of fresh heads: bfloat16 translator, float32 probe."""
    torch.manual_seed(0)
    heads = ExitHeads(
        {4: ExitHead(Translator(64, width=80, eps=1e-5), Probe(64, eps=1e-3)), 2: ExitHead(probe=Probe(64))},
        {"steps": "7", "data": "naïve text"},
    )
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    return heads.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_translator_is_the_identity(dtype):
    h = torch.randn(3, 5, 64).to(dtype) * 30
    assert torch.equal(Translator(64)(h), h)
    assert torch.equal(Translator(64).to(dtype)(h), h)
    assert ExitHead().state(h) is h


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_decoder_layer_is_that_of_a_stock_llama(tmp_path, key_value_heads):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = transformers.LlamaConfig(
        vocab_size=9, hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=key_value_heads, rms_norm_eps=1e-3, initializer_range=0.3)  # fmt: skip
    stock = transformers.LlamaModel(options).eval()
    own, layer = DecoderLayer(64, 4, key_value_heads, width=80, eps=1e-3), stock.layers[0]
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    with torch.no_grad():
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(torch.rand(64) + 0.5)
        own.weight.copy_(torch.stack([layer.input_layernorm.weight, layer.post_attention_layernorm.weight]))
        for name in ("query", "key", "value", "out", "gate", "up", "down"):
            where = layer.self_attn if name in names else layer.mlp
            getattr(own, name).weight.copy_(getattr(where, f"{names.get(name, name)}_proj").weight)
        stock.norm = nn.Identity()
        h = torch.randn(3, 11, 64)
        expected = stock(inputs_embeds=h, use_cache=False).last_hidden_state
        torch.testing.assert_close(own(h), expected, rtol=1e-4, atol=1e-5)
        assert (own(h) - h).abs().max() > 0.1
    ExitHeads({2: ExitHead(layer=own)}).save(tmp_path / "heads", config())
    loaded = ExitHeads.load(tmp_path / "heads", config())[2]
    assert loaded.translator is None and torch.equal(loaded.state(h), own(h))


def test_decoder_layer_starts_as_the_identity_and_refuses_heads_that_do_not_fit():
    h = torch.randn(2, 5, 64).bfloat16()
    assert torch.equal(DecoderLayer(64, 4)(h), h)
    for wrong in ({"heads": 5}, {"heads": 4, "key_value_heads": 3}, {"heads": 64}):
        with pytest.raises(ValueError, match="heads must divide 64 into even parts and be a multiple"):
            DecoderLayer(64, **wrong)


def test_translator_computes_its_formula():
    torch.manual_seed(0)
    translator = Translator(64, width=80, eps=1e-2)
    for parameter in translator.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(7, 64) * 0.1
    x = h.double() / (h.double().square().mean(-1, keepdim=True) + 1e-2).sqrt() * translator.weight
    expected = h + F.silu(x @ translator.up.weight.T.double()) @ translator.down.weight.T.double()
    torch.testing.assert_close(translator(h).double(), expected, rtol=1e-5, atol=1e-5)
    assert Translator(64).up.weight.shape == (128, 64)


def test_translator_keeps_the_input_dtype_and_takes_its_mean_square_in_float32():
    translator = Translator(64)
    nn.init.normal_(translator.down.weight)
    h = torch.randn(7, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert translator.to(dtype)(h).dtype == torch.float32
        assert translator(h.to(dtype)).dtype == dtype
        assert translator.float()(h.to(dtype)).dtype == dtype
    large = torch.full((1, 64), 1000.0)  # its square overflows float16
    assert torch.allclose(translator(large.half()).float(), translator.float()(large), atol=0.5)


def test_probe_is_a_sigmoid_of_the_normalised_state():
    probe = Probe(64)
    assert torch.equal(probe(torch.randn(2, 3, 64)), torch.full((2, 3), 0.5))
    nn.init.normal_(probe.weight)
    nn.init.constant_(probe.bias, -1.0)
    h = torch.randn(7, 64)
    expected = torch.sigmoid(F.rms_norm(h, (64,), eps=1e-6) @ probe.weight - 1)
    torch.testing.assert_close(probe(h), expected)
    torch.testing.assert_close(probe(100 * h), probe(h))


def test_a_cast_leaves_the_probe_in_float32_bit_for_bit():
    heads = ExitHeads({4: ExitHead(Translator(64), Probe(64))})
    nn.init.normal_(heads[4].probe.weight)  # not exact in 16 bits
    before = heads[4].probe.weight.clone()
    for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        getattr(heads, cast)()
        assert heads.to(dtype)[4].translator.up.weight.dtype == dtype
        assert heads[4].probe.weight.dtype == heads[4].probe.bias.dtype == torch.float32
        assert torch.equal(heads[4].probe.weight, before)
    assert heads[4].probe(torch.randn(2, 64).half()).dtype == torch.float32


def test_a_probe_follows_its_module_to_another_device(heads):
    moved = heads.to("meta", torch.float16)
    assert moved[4].probe.weight.is_meta and moved[4].probe.weight.dtype == torch.float32
    assert not moved.to_empty(device="cpu")[4].probe.weight.is_meta


def test_heads_read_like_a_mapping_in_the_order_of_the_layers():
    heads = ExitHeads({12: ExitHead(), 2: ExitHead(), 100: ExitHead()})
    assert list(heads) == [2, 12, 100] and len(heads) == 3
    assert 12 in heads and 3 not in heads and "12" not in heads
    with pytest.raises(KeyError, match=r"no exit head at layer 3, there are heads at \[2, 12, 100\]"):
        heads[3]
    with pytest.raises(ValueError, match=r"exit layers must be 0 or larger, got \[-1, 4\]"):
        ExitHeads({4: ExitHead(), -1: ExitHead()})


def test_heads_come_back_from_a_file_as_they_were_saved(heads, tmp_path):
    path = tmp_path / "heads.safetensors"
    heads.save(path, config())
    loaded = ExitHeads.load(path, config())

    assert list(loaded) == [2, 4] and loaded.metadata == heads.metadata
    assert loaded[2].translator is None
    assert (loaded[4].translator.width, loaded[4].translator.eps, loaded[4].probe.eps) == (80, 1e-5, 1e-3)
    saved, read = heads.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    for name in saved:
        assert read[name].dtype == saved[name].dtype and torch.equal(read[name], saved[name])
    h = torch.randn(5, 64)
    assert torch.equal(loaded[4].state(h), heads[4].state(h))
    assert torch.equal(loaded[4].probe(h), heads[4].probe(h))
    assert [file.name for file in tmp_path.iterdir()] == ["heads.safetensors"]


def test_heads_without_parameters_can_be_saved(tmp_path):
    ExitHeads({3: ExitHead()}).save(tmp_path / "heads", config())
    assert ExitHeads.load(tmp_path / "heads", config())[3].translator is None


def test_the_heads_of_another_model_are_refused_by_the_fields_that_differ(heads, tmp_path):
    path = tmp_path / "heads.safetensors"
    heads.save(path, config())
    other = config(num_hidden_layers=8, model_type="qwen3", dtype="float16")
    message = "belongs to another model: expected model_type llama, got qwen3; num_hidden_layers 6, got 8"
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        ExitHeads.load(path, other)
    del other.intermediate_size
    with pytest.raises(ValueError, match="intermediate_size 96, got None"):
        ExitHeads.load(path, other)


def test_a_fingerprint_is_plain_data_and_knows_no_dtype():
    assert fingerprint(config(dtype="bfloat16", torch_dtype=torch.bfloat16)) == vars(config())
    assert json.loads(json.dumps(fingerprint(config()))) == fingerprint(config())
    assert "intermediate_size" not in fingerprint(config(intermediate_size=None))


def test_a_file_of_something_else_is_refused(tmp_path):
    text, tensors, future = tmp_path / "text", tmp_path / "tensors", tmp_path / "future"
    text.write_text("no tensors at all")
    safetensors.save_file({"weight": torch.zeros(2)}, tensors)
    safetensors.save_file({}, future, {"format": "exeunt.heads", "version": "2"})
    for path in (text, tensors, future):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not an exeunt heads file"):
            ExitHeads.load(path, config())
    with pytest.raises(FileNotFoundError):
        ExitHeads.load(tmp_path / "absent", config())


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_an_interrupted_save_leaves_the_old_file_and_no_other(heads, tmp_path, monkeypatch, moment):
    path = tmp_path / "heads.safetensors"
    heads.save(path, config())
    old = path.read_bytes()

    def write_half(path, data):
        path.open("wb").write(data[: len(data) // 2])
        raise KeyboardInterrupt

    def refuse(*_):
        raise KeyboardInterrupt

    if moment == "while writing":
        monkeypatch.setattr(Path, "write_bytes", write_half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        ExitHeads({1: ExitHead(Translator(64))}).save(path, config())
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_without_safetensors_one_sentence_says_what_to_install(heads, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"need safetensors: pip install exeunt\[hf\]$"):
        heads.save(tmp_path / "heads", config())


def test_one_probe_with_a_hidden_layer_for_all_exits(tmp_path):
    shared = Probe(64, width=8)
    nn.init.normal_(shared.weight)
    heads = ExitHeads({1: ExitHead(probe=shared), 3: ExitHead(probe=shared)}).bfloat16()
    assert shared.hidden.weight.dtype == torch.float32
    heads.save(tmp_path / "heads.safetensors", config())
    loaded, h = ExitHeads.load(tmp_path / "heads.safetensors", config()), torch.randn(3, 64)
    assert all(torch.equal(loaded[e].probe(h), shared(h)) for e in (1, 3))
