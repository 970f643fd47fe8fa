"""Training with tokens that leave: the formula, and that what is trained is what runs."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

import exeunt
from exeunt.policies import Policy
from exeunt.training import PASSED, SAID, CrossEntropy, Distillation, Leaving, Objective
from exeunt.training.leaving import margins

EXITS, LAYERS = (0, 2), 5


def small(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # attention that matters
    return model


def leaving(model, *terms):
    return Leaving(model, EXITS, Objective(*terms))


def layer_by_layer(model, ids, left):
    """States after every layer, [L, B, S, D]: a token that has left keeps its state, and is attended to with it."""
    decoder = model.model
    positions = torch.arange(ids.shape[1])[None]
    rotary = decoder.rotary_emb(decoder.embed_tokens(ids), positions)
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, *later.shape).masked_fill(later, -1e9)
    state, states = decoder.embed_tokens(ids), []
    for i, layer in enumerate(decoder.layers):
        out = layer(state, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        out = out[0] if isinstance(out, tuple) else out
        state = torch.stack(
            [torch.stack([o if i <= d else s for o, s, d in zip(*rows, strict=True)])
             for rows in zip(out, state, left, strict=True)]
        )  # fmt: skip
        states.append(state)
    return torch.stack(states)


def test_loss_and_gradients_are_those_of_the_formula():
    model = small()
    ids = torch.randint(40, (3, 10))
    left = torch.tensor([[0, 4, 2] * 3, [4] * 9, [2, 2, 0] * 3])
    module = leaving(model, CrossEntropy({SAID: 0.7, PASSED: 0.2}), Distillation(1.3))
    module.draw = lambda teacher, shape: left

    torch.manual_seed(1)
    loss = module(ids)
    got = torch.autograd.grad(loss, list(model.parameters()))

    torch.manual_seed(1)  # the exits that were passed are the only draw that is left
    which = torch.randint(len(EXITS), (27, 1))[:, 0].view(3, 9)
    states = layer_by_layer(model, ids[:, :-1], left)
    passed = torch.stack([states[EXITS[k], b, t] for b, row in enumerate(which) for t, k in enumerate(row)])
    with torch.no_grad():
        q = model(ids[:, :-1]).logits.flatten(0, 1).softmax(-1)
    expected = 0
    for state, weight in ((states[-1].flatten(0, 1), 0.7), (passed, 0.2)):
        p = model.lm_head(model.model.norm(state)).log_softmax(-1)
        expected = expected + weight * F.nll_loss(p, ids[:, 1:].flatten())
        expected = expected + 1.3 * (q * (q.log() - p)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, g, e in zip(
        dict(model.named_parameters()), got, torch.autograd.grad(expected, list(model.parameters())), strict=True
    ):
        assert (g - e).abs().max() <= 2e-4 * e.abs().max(), name


class Forced(LogitsProcessor):
    def __init__(self, text):
        self.text = text

    def __call__(self, ids, scores):
        return torch.full_like(scores, -float("inf")).scatter_(1, self.text[:, ids.shape[1], None], 0.0)


@dataclass(frozen=True)
class Given(Policy):
    """Let the t-th decoded token leave after a given layer."""

    left: tuple[int, ...]

    def step(self, state, seen, at):
        return torch.tensor([at.layer >= self.left[at.position.produced - 1]])


@torch.no_grad()
@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_trained_is_what_runs(lazy):
    model = small().eval()
    text = torch.randint(40, (1, 12))
    prompt = 4
    decoded = [0, 4, 2, 0, 0, 4, 2]  # of the tokens that are fed after the prompt
    left = torch.tensor([[LAYERS - 1] * prompt + decoded])
    module = leaving(model, Distillation())
    said = module.student(text[:, :-1], left, module.depths(text[:, :-1]))[SAID].state
    recipe = replace(exeunt.recipes.calm(EXITS, 0.5, lazy=lazy), policy=Given(tuple(decoded)))
    with exeunt.attach(model, recipe) as early:
        out = model.generate(text[:, :prompt], attention_mask=torch.ones(1, prompt), do_sample=False, pad_token_id=0,
                             max_new_tokens=12 - prompt, logits_processor=[Forced(text)], output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
    assert early.report().histogram == {0: 3, 2: 2, 4: 2}
    got = torch.cat(out.logits)[1:]  # the first comes from the prompt
    torch.testing.assert_close(got, model.lm_head(said)[prompt:], rtol=1e-4, atol=1e-4)


def test_tokens_leave_at_the_first_open_exit_that_is_sure():
    model = small()
    module = leaving(model, Distillation())
    ids = torch.randint(40, (64, 9))
    with torch.no_grad():
        teacher = module.depths(ids)
    torch.manual_seed(3)
    left = module.draw(teacher, ids.shape)
    torch.manual_seed(3)
    open_, threshold, stays = torch.rand(64, 2) < 0.5, torch.rand(64) ** 3, torch.rand(64) < 0.25
    sure = [margins(teacher[e]).view(64, 9) for e in EXITS]
    for b in range(64):
        for t in range(9):
            goes = [e for k, e in enumerate(EXITS) if open_[b, k] and not stays[b] and sure[k][b, t] >= threshold[b]]
            assert left[b, t] == (goes[0] if goes else LAYERS - 1)
    assert set(left.unique().tolist()) == {0, 2, 4}
