"""Every term against autograd of its formula, written out as in the papers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from exeunt.heads import ExitHead, ExitHeads, Probe
from exeunt.training import (
    CrossEntropy,
    Depth,
    Distillation,
    LayerwiseDistillation,
    Objective,
    ProbeLoss,
    depth_weights,
    objectives,
)

EXITS = (1, 4)
FINAL = 6


def depths_of(rows, width, vocabulary, *, shared, bias, seed=0):
    """Random depths in float64, so that a wrong gradient cannot hide in rounding, and the leaves to differentiate."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    one = (leaf(vocabulary, width), leaf(vocabulary) if bias else None)
    depths = {}
    for depth in (*EXITS, FINAL):
        weight, offset = one if shared else (leaf(vocabulary, width), leaf(vocabulary) if bias else None)
        depths[depth] = Depth(leaf(rows, width), leaf(rows, width), weight, offset)
    return depths


def leaves(depths):
    found = [t for d in depths.values() for t in (d.raw, d.state, d.weight, d.bias) if t is not None]
    return list({id(t): t for t in found}.values())


def gradients(loss, depths):
    return torch.autograd.grad(loss, leaves(depths), allow_unused=True)


def logits(depth):
    z = depth.state @ depth.weight.T
    return z if depth.bias is None else z + depth.bias


def cross_entropy(weights):
    def formula(depths, labels):
        total = 0
        for e, w in weights.items():
            z = logits(depths[e])
            total = total - w * (z[range(len(z)), labels] - z.exp().sum(-1).log()).mean()
        return total

    return CrossEntropy(weights), formula


def forward_kl(weight):
    def formula(depths, labels):
        q = logits(depths[FINAL]).softmax(-1).detach()
        return weight * sum((q * (q.log() - logits(depths[e]).softmax(-1).log())).sum(-1).mean() for e in EXITS)

    return Distillation(weight), formula


def reverse_kl(weight):
    def formula(depths, labels):
        q = logits(depths[FINAL]).softmax(-1).detach()
        total = 0
        for e in EXITS:
            p = logits(depths[e]).softmax(-1)
            total = total + weight * (p * (p.log() - q.log())).sum(-1).mean()
        return total

    return Distillation(weight, reverse=True), formula


def layerwise(weight):
    def unit(x):
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()

    def formula(depths, labels):
        target = unit(depths[FINAL].state.detach())
        return weight * sum(F.mse_loss(unit(depths[e].state), target) for e in EXITS)

    return LayerwiseDistillation(weight), formula


TERMS = {
    "ce sum": cross_entropy(depth_weights("sum", [*EXITS, FINAL])),
    "ce depth": cross_entropy(depth_weights("depth", [*EXITS, FINAL])),
    "ce final": cross_entropy(depth_weights("final", [*EXITS, FINAL])),
    "ce one exit": cross_entropy({1: 0.7}),
    "kl": forward_kl(1.0),
    "kl reversed": reverse_kl(0.3),
    "layerwise": layerwise(2.0),
}


def check(terms, depths, labels):
    with torch.no_grad():
        expected_parts = [formula(depths, labels) for _, formula in terms]
    expected = gradients(sum(formula(depths, labels) for _, formula in terms), depths)
    loss, _ = Objective(*(term for term, _ in terms))(depths, labels)
    got = gradients(loss, depths)
    assert loss.item() == pytest.approx(sum(p.item() for p in expected_parts), rel=1e-5, abs=1e-6)
    for g, e in zip(got, expected, strict=True):
        g, e = (torch.zeros(()) if t is None else t.double() for t in (g, e))
        assert (g - e).abs().max() <= 2e-6 * max(1.0, e.abs().max()), "a gradient differs"


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shared", [True, False], ids=["one head", "a head per exit"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradient_is_that_of_the_formula(name, shared, bias):
    depths = depths_of(7, 5, 11, shared=shared, bias=bias)
    check([TERMS[name]], depths, torch.arange(7))


@pytest.mark.parametrize("pair", itertools.combinations(TERMS, 2), ids=" + ".join)
def test_terms_add_up(pair):
    check([TERMS[name] for name in pair], depths_of(4, 3, 6, shared=True, bias=True), torch.tensor([0, 5, 2, 2]))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), chunk=st.integers(1, 5), vocabulary=st.integers(2, 9), seed=st.integers(0, 99))
def test_rows_at_a_time_change_nothing(rows, chunk, vocabulary, seed):
    depths = depths_of(rows, 4, vocabulary, shared=True, bias=False, seed=seed)
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    whole = objectives.ROWS
    objectives.ROWS = chunk
    try:
        check([TERMS["ce depth"], TERMS["kl"]], depths, labels)
    finally:
        objectives.ROWS = whole


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_part_of_the_vocabulary_that_is_all_of_it_changes_nothing(bias):
    depths = depths_of(7, 5, 11, shared=True, bias=bias)
    labels = torch.arange(7)
    terms = [TERMS["ce depth"][0], TERMS["kl"][0]]
    whole, agrees = Objective(*terms)(depths, labels)
    part, also = Objective(*terms, sample=11)(depths, labels)
    assert part.item() == pytest.approx(whole.item())
    for a, b in zip(
        *(torch.autograd.grad(loss, leaves(depths), allow_unused=True) for loss in (whole, part)), strict=True
    ):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))
    assert all(torch.equal(agrees[e], also[e]) for e in EXITS)


def test_a_part_of_the_vocabulary_stands_for_the_whole(monkeypatch):
    """What is likely and the labels are in it, sums of exp(logits) are met on average, gradients are autograd's."""
    monkeypatch.setattr(objectives, "LIKELY", 2)
    depths = depths_of(3, 6, 400, shared=True, bias=False)
    labels = torch.tensor([7, 300, 8])
    p = logits(depths[FINAL]).softmax(-1)
    likely = {k for k in range(400) if (p[:, k] >= p.amax(1) / 2).any()}
    exact, sums = logits(depths[1]).exp().sum(-1), []
    for seed in range(400):
        torch.manual_seed(seed)
        part, stands_for = objectives.drawn(depths[FINAL], labels, 100)
        assert likely | {7, 8, 300} <= set(part.tolist()) and (part.diff() > 0).all()
        assert len(part) == len(likely | {7, 8, 300}) + 100 and stands_for.exp().sum() == pytest.approx(400, rel=1e-4)
        sums.append((logits(depths[1])[:, part] + stands_for).exp().sum(-1))
    error = torch.stack(sums).std(0) / 20
    assert ((torch.stack(sums).mean(0) - exact).abs() < 4 * error).all() and (error < 0.05 * exact).all()

    objective = Objective(TERMS["ce depth"][0], TERMS["kl"][0], sample=100)
    torch.manual_seed(5)
    loss, agrees = objective(depths, labels)
    torch.manual_seed(5)
    assert objective(depths, labels)[0] == loss
    torch.manual_seed(5)
    part, stands_for = objectives.drawn(depths[FINAL], labels, 100)
    z = {e: logits(d)[:, part] for e, d in depths.items()}
    p = {e: (z[e] + stands_for).log_softmax(-1) for e in z}
    at, q = torch.searchsorted(part, labels), p[FINAL].detach()
    expected = sum(w * F.nll_loss(p[e], at) for e, w in depth_weights("depth", [*EXITS, FINAL]).items())
    expected = expected + sum((q.exp() * (q - p[e])).sum(-1).mean() for e in EXITS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(
        *(torch.autograd.grad(v, leaves(depths), allow_unused=True) for v in (loss, expected)), strict=True
    ):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a.double(), b, atol=1e-5))
    for e in EXITS:  # a token that stands for many is not thereby the likeliest
        assert torch.equal(agrees[e], z[e].argmax(-1) == z[FINAL].argmax(-1))
    with torch.no_grad():
        assert objective(depths, labels)[0] == Objective(*objective.terms)(depths, labels)[0], "measured on all of it"
    with pytest.raises(ValueError, match="^sample must be 1 token or more, got 0$"):
        Objective(ProbeLoss(), sample=0)


def test_rows_without_a_label_do_not_count():
    depths = depths_of(5, 4, 7, shared=True, bias=False)
    labels = torch.tensor([1, -100, 3, -100, 0])
    kept = {e: d._replace(raw=d.raw[labels >= 0], state=d.state[labels >= 0]) for e, d in depths.items()}
    objective = Objective(TERMS["ce sum"][0], Distillation())
    loss, agrees = objective(depths, labels)
    assert loss.item() == pytest.approx(objective(kept, labels[labels >= 0])[0].item())
    assert all(len(a) == 3 for a in agrees.values())


def probes(width):
    torch.manual_seed(3)
    heads = ExitHeads({e: ExitHead(probe=Probe(width)) for e in EXITS})
    for e in EXITS:
        torch.nn.init.normal_(heads[e].probe.weight)
    return heads


@pytest.mark.parametrize("balanced", [True, False])
def test_probe_loss_is_its_formula(balanced):
    depths = {e: d._replace(raw=d.raw.float()) for e, d in depths_of(40, 6, 5, shared=True, bias=False).items()}
    heads = probes(6)
    loss, agrees = Objective(ProbeLoss(0.5, balanced))(depths, None, heads)
    total = 0
    for e in EXITS:
        p = heads[e].probe(depths[e].raw.detach())
        y = (logits(depths[e]).argmax(-1) == logits(depths[FINAL]).argmax(-1)).float()
        assert torch.equal(agrees[e], y.bool()) and 0 < y.mean() < 1
        if balanced:
            total = total - 0.5 * ((y * p.log()).sum() / y.sum() + ((1 - y) * (1 - p).log()).sum() / (1 - y).sum()) / 2
        else:
            total = total - 0.5 * (y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    parameters = list(heads.parameters())
    for g, e in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_probe_loss_with_one_class_is_finite():
    depths = depths_of(4, 6, 5, shared=True, bias=False)
    same = {e: d._replace(state=depths[FINAL].state) for e, d in depths.items()}
    loss, agrees = Objective(ProbeLoss())(same, None, probes(6))
    assert loss.isfinite() and all(a.all() for a in agrees.values())


def test_bfloat16_states_stay_close():
    depths = {
        e: Depth(d.raw.bfloat16(), d.state.detach().bfloat16().requires_grad_(), d.weight.detach().float())
        for e, d in depths_of(64, 32, 50, shared=True, bias=False).items()
    }
    wide = {e: Depth(d.raw, d.state.detach().float(), d.weight) for e, d in depths.items()}
    labels = torch.arange(64) % 50
    objective = Objective(CrossEntropy(depth_weights("sum", [*EXITS, FINAL])), Distillation())
    loss, _ = objective(depths, labels)
    assert loss.item() == pytest.approx(objective(wide, labels)[0].item(), rel=2e-2)
    assert torch.autograd.grad(loss, depths[1].state)[0].dtype == torch.bfloat16


def test_no_memory_of_rows_times_vocabulary(monkeypatch):
    seen = []
    plain = F.linear

    def noting(x, w, *rest):
        seen.append(len(x))
        return plain(x, w, *rest)

    monkeypatch.setattr(objectives, "F", SimpleNamespace(linear=noting))
    Objective(Distillation())(depths_of(1000, 4, 6, shared=True, bias=False), None)
    assert max(seen) <= objectives.ROWS


def test_weights_over_depths():
    assert depth_weights("sum", [0, 3]) == {0: 1.0, 3: 1.0}
    assert depth_weights("depth", [1, 3, 5]) == {1: 2 / 12, 3: 4 / 12, 5: 6 / 12}
    assert depth_weights("final", [0, 3]) == {3: 1.0}
    with pytest.raises(ValueError, match="'sum', 'depth' or 'final', got 'all'"):
        depth_weights("all", [0])


def test_missing_labels_are_named():
    depths = depths_of(3, 4, 5, shared=True, bias=False)
    objective = Objective(CrossEntropy({FINAL: 1.0}))
    with pytest.raises(ValueError, match="objective 'ce' needs labels, got data without any"):
        objective(depths, None)
    with pytest.raises(ValueError, match="every label is missing"):
        objective(depths, torch.full((3,), -100))
    with pytest.raises(ValueError, match="needs exit heads with a probe, got none"):
        Objective(ProbeLoss())(depths, None)
    with pytest.raises(ValueError, match="at least one term"):
        Objective()
