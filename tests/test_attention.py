"""attn_implementation="exeunt" beside a stock model's eager attention: logits, generated tokens, who served."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from exeunt import attention

SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=97,
             pad_token_id=0, eos_token_id=None, bos_token_id=1)  # fmt: skip
GROUPED = SIZES | dict(num_key_value_heads=2)
DECODERS = {
    "Llama": GROUPED,
    "Mistral": GROUPED | dict(sliding_window=7),
    "Qwen3": GROUPED | dict(head_dim=16),
    "Gemma2": GROUPED | dict(head_dim=16, sliding_window=8, attn_logit_softcapping=5.0),
    "GPT2": dict(n_embd=64, n_layer=3, n_head=4, vocab_size=97, pad_token_id=0, eos_token_id=None, bos_token_id=1),
}
LEFT = torch.tensor([[0] * 6 + [1] * 14, [1] * 20, [0] * 13 + [1] * 7])


@pytest.fixture(autouse=True)
def registered():
    attention.register_attention()
    attention.served.clear()


def make(kind, head="ForCausalLM", **sizes):
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else head
    return getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**sizes)).eval()


def ids(mask=LEFT):
    return torch.randint(1, 97, mask.shape, generator=torch.Generator().manual_seed(1)) * mask


def both(model, run):
    """What `run` gives with stock eager attention, and with exeunt's; counts are those of the latter."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = run()
        model.set_attn_implementation("exeunt")
        attention.served.clear()
        return want, run()


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("kind", DECODERS)
def test_logits_of_padded_batches(kind, side):
    model = make(kind, **DECODERS[kind])
    mask = {"left": LEFT, "right": LEFT.flip(1), "none": torch.ones_like(LEFT)}[side]
    want, got = both(model, lambda: model(ids(mask), attention_mask=mask).logits)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-5)
    assert attention.served == {"ragged_attention": 3}


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_tokens_are_those_of_eager_attention(kind):
    model = make(kind, **DECODERS[kind])
    want, got = both(model, lambda: model.generate(ids(), attention_mask=LEFT, max_new_tokens=12, do_sample=False))
    assert torch.equal(got, want)
    assert attention.served == {"ragged_attention": 3 * 12}


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(cache_implementation="static"), dict(use_cache=False)],
                         ids=["beams", "static cache", "no cache"])  # fmt: skip
def test_other_ways_to_generate(options):
    model = make("Llama", **GROUPED)
    options = options | dict(max_new_tokens=6, do_sample=False, disable_compile=True)
    want, got = both(model, lambda: model.generate(ids(), attention_mask=LEFT, **options))
    assert torch.equal(got, want)
    assert not any(name.startswith("sdpa") for name in attention.served)


def test_a_prompt_in_two_parts():
    model = make("Mistral", **DECODERS["Mistral"])

    def run():
        first = model(ids()[:, :12], attention_mask=LEFT[:, :12], use_cache=True)
        return model(ids()[:, 12:], attention_mask=LEFT, past_key_values=first.past_key_values).logits

    want, got = both(model, run)
    torch.testing.assert_close(got[1:2], want[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Bert", "DistilBert"])
def test_encoders_with_right_padding(kind):
    sizes = SIZES if kind == "Bert" else dict(dim=64, n_layers=3, n_heads=4, hidden_dim=64, vocab_size=97)
    model, mask = make(kind, "Model", **sizes), LEFT.flip(1)
    want, got = both(model, lambda: model(ids(mask), attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-5)
    if tuple(map(int, transformers.__version__.split(".")[:1])) >= (5,):  # before, these had attention of their own
        assert attention.served == {"ragged_attention": 3}


def test_what_is_no_range_is_left_to_stock_attention_and_counted():
    model = make("Llama", **GROUPED)
    holes = torch.ones_like(LEFT)
    holes[:, 5:8] = 0
    custom = torch.tril(torch.ones(20, 20, dtype=torch.bool)).expand(3, 1, 20, 20)
    for mask, seen in ((holes, holes), (torch.where(custom, 0.0, -torch.inf), torch.ones_like(holes))):
        want, got = both(model, lambda mask=mask: model(ids(holes), attention_mask=mask).logits)
        torch.testing.assert_close(got[seen.bool()], want[seen.bool()], rtol=1e-5, atol=1e-5)
        assert attention.served == {"sdpa: a mask that is no range of keys a row": 3}


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_training_runs_as_stock_attention(kind):
    model = make(kind, **DECODERS[kind]).train()
    grads = []
    for name in ("eager", "exeunt"):
        model.set_attn_implementation(name)
        model.zero_grad()
        attention.served.clear()
        model(ids(), attention_mask=LEFT).logits[LEFT.bool()].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert attention.served == {"sdpa: training": 3}


def test_masks_hold_a_few_integers_a_row():
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    mask = LEFT.bool()
    ranges = attention.ranges_of(3, 20, 20, 0, 0, sliding_window_causal_mask_function(7), mask)
    assert ranges.shape == (3, 1, 1, attention.FIELDS)
    assert ranges.flatten(1).tolist() == [[6, 20, 0, 7, 1], [0, 20, 0, 7, 1], [13, 20, 0, 7, 1]]
    i = torch.arange(20)
    seen = (i <= i[:, None]) & (i > i[:, None] - 7) & mask[:, None, None]
    assert torch.equal(attention._dense(ranges, 20, 20), seen)
    assert attention.ranges_of(3, 1, 21, 20, 0, causal_mask_function, None).flatten(1)[0].tolist() == [0, 21, 20, 0, 1]
    chunks = lambda b, h, q, k: (k <= q) & (k // 2 == q // 2)  # noqa: E731
    chunked = attention.ranges_of(1, 4, 4, 0, 0, chunks, torch.tensor([[False, True, True, True]]))
    assert chunked.dtype == torch.bool and chunked.shape == (1, 1, 4, 4)


def test_importing_exeunt_does_not_import_transformers():
    code = "import exeunt, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
