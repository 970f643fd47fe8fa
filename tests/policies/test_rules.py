"""Every policy on sequences computed by hand, in a batch as alone, and after any compaction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exeunt.policies import (
    Accumulate,
    At,
    Decay,
    Evidence,
    Falling,
    FirstOf,
    FixedDepth,
    Halting,
    Oracle,
    Patience,
    Position,
    Threshold,
    Vote,
    Window,
    keep,
)

NAN = math.nan
CLASSES = 3


def evidence(exits, **fields):
    """Evidence of one row at each depth, from lists over depth."""
    kinds = {"label": torch.int64, "truth": torch.int64}
    return [
        Evidence(**{name: torch.tensor([values[k]], dtype=kinds.get(name)) for name, values in fields.items()})
        for k in range(exits + 1)
    ]


def play(policy, depths, *, reorder=None, position=None, layers=None):
    """Exit index and answer of each row: what a host does, in the order that ``reorder(n)`` puts the rows each time."""
    exits = len(depths) - 1
    rows = torch.arange(len(next(f for f in depths[0] if f is not None)))
    left, answers = torch.full_like(rows, exits), [None] * len(rows)
    state = policy.start(len(rows), classes=CLASSES)

    def note(gone, answer, k):
        for i, row in enumerate(gone.tolist()):
            left[row] = k
            answers[row] = None if answer.label is None else int(answer.label[i])

    for k in range(exits + 1):
        at = At(k, k if layers is None else layers[k], exits, position)
        if at.last and not policy.answers:
            note(rows, depths[k].take(rows), k)
            break
        if reorder is not None:
            order = reorder(len(rows))
            rows, state = rows[order], keep(state, order)
        seen = depths[k].take(rows)
        if not policy.looks(at):
            continue
        leave = policy.step(state, seen, at)
        assert leave.shape == rows.shape and leave.dtype == torch.bool
        if at.last:
            leave = torch.ones_like(leave)
        note(rows[leave], policy.answer(keep(state, leave), seen.take(leave), at), k)
        rows, state = rows[~leave], keep(state, ~leave)
    return list(zip(left.tolist(), answers, strict=True))


def one(policy, exits, **fields):
    return play(policy, evidence(exits, **fields))[0]


# ---- by hand


@pytest.mark.parametrize(
    "policy,scores,leaves",
    [
        (Threshold(0.5), [0.5, 0.0, 0.0], 0),  # a tie leaves, at the first exit
        (Threshold(0.5, strict=True), [0.5, 0.51, 0.0], 1),  # a tie stays
        (Threshold(0.5), [0.4, 0.4, 1.0], 2),  # full depth asks for nothing
        (Threshold(0.5), [NAN, 0.4, 0.4], 2),
        (Threshold(0.0), [NAN, math.inf, 0.0], 2),  # nothing that is not finite leaves
        (Threshold(-math.inf), [-math.inf, -1.0, 0.0], 0),
        (Threshold(math.inf), [1.0, 1.0, 1.0], 2),
        (Threshold((0.9, 0.3)), [0.5, 0.5, 0.0], 1),
        (Threshold((0.3, 0.9)), [0.5, 0.5, 0.0], 0),
        (Threshold(0.5, min_exit=1), [0.9, 0.9, 0.0], 1),
        (Threshold(0.5, interval=2), [0.4, 0.9, 0.0], 2),
        (Threshold(0.5, min_exit=1, interval=2), [0.9, 0.9, 0.0], 1),
    ],
)
def test_threshold(policy, scores, leaves):
    assert one(policy, 2, score=scores)[0] == leaves


def test_threshold_interval_counts_layers():
    depths = evidence(3, score=[0.9, 0.9, 0.9, 0.0])
    assert play(Threshold(0.5, min_exit=4, interval=4), depths, layers=[3, 6, 8, 11])[0][0] == 2


def test_decay_follows_the_position():
    policy, depths = Threshold(0.8, Decay(4.0)), evidence(1, score=[0.76, 0.0])
    assert play(policy, depths, position=Position(0, 100))[0][0] == 1  # 0.82
    assert play(policy, depths, position=Position(50, 100))[0][0] == 0  # 0.7335


@pytest.mark.parametrize(
    "scores,answer",
    [
        ([0.3, 0.6, 0.5], (2, 1)),  # nobody reached 0.9: exit 1 was surest
        ([0.3, 0.6, 0.7], (2, 2)),  # full depth was
        ([0.6, 0.6, 0.6], (2, 0)),  # the first among equals
        ([NAN, 0.1, NAN], (2, 1)),
        ([NAN, math.inf, NAN], (2, 2)),  # nothing to compare: full depth
        ([0.3, 0.95, 0.99], (1, 1)),  # who leaves takes the exit's own
    ],
)
def test_most_confident_of_all_exits_answers_where_none_lets_go(scores, answer):
    policy = Threshold(0.9, fallback="most_confident")
    assert one(policy, 2, score=scores, label=[0, 1, 2]) == answer


@pytest.mark.parametrize(
    "patience,labels,leaves",
    [
        (1, [0, 0, 1, 1], 1),  # the second exit is the first chance
        (2, [1, 1, 1, 0], 2),  # three equal labels
        (1, [0, 1, 2, 2], 3),  # agreement with full depth is too late to leave early
        (2, [0, 0, 1, 1], 3),  # a change of class starts the count afresh
        (1, [-1, -1, 0, 0], 3),  # NaN agrees with nothing, not even NaN
        (1, [0, -1, 0, 0], 3),
    ],
)
def test_patience(patience, labels, leaves):
    assert one(Patience(patience), 3, label=labels) == (leaves, labels[leaves])


@pytest.mark.parametrize(
    "values,leaves",
    [
        ([1.0, 1.05, 1.0, 0.0], 2),  # two differences below 0.1
        ([1.0, 1.125, 1.125, 1.125], 3),
        ([1.0, NAN, 1.0, 1.0], 3),
    ],
)
def test_patience_of_regression(values, leaves):
    depths = [Evidence(logits=torch.tensor([[v]])) for v in values]
    assert play(Patience(2, tolerance=0.1), depths)[0][0] == leaves


def test_patience_tolerance_is_strict():
    depths = [Evidence(logits=torch.tensor([[v]])) for v in (0.0, 0.5, 0.5, 0.0)]
    assert play(Patience(1, tolerance=0.5), depths)[0][0] == 2


@pytest.mark.parametrize(
    "policy,labels,answer",
    [
        (Vote(2.0, alpha=0.0), [0, 1, 1, 0], (2, 1)),  # two votes
        (Vote(3.0, alpha=0.0), [0, 1, 1, 0], (3, 0)),  # never three; 2:2 goes to the lower class, full depth votes too
        (Vote(1.0), [2, 0, 0, 0], (0, 2)),  # one of one
        (Vote(0.75), [2, 0, 0, 0], (0, 2)),
        (Vote(2 / math.sqrt(3) - 1e-6, alpha=0.5), [0, 1, 1, 1], (2, 1)),
        (Vote(2 / math.sqrt(3) + 1e-6, alpha=0.5), [0, 1, 1, 2], (3, 1)),
        (Vote(1.0), [-1, -1, -1, 2], (3, 2)),  # no vote from NaN, but the exit is counted
        (Vote(1.0), [-1, 2, 2, 2], (3, 2)),
        (Vote(1.0), [-1, -1, -1, -1], (3, -1)),
    ],
)
def test_vote(policy, labels, answer):
    assert one(policy, 3, label=labels) == answer


@pytest.mark.parametrize(
    "policy,labels,probs,leaves",
    [
        (Window(2), [0, 0, 0, 0], [0.6, 0.7, 0.7, 0.7], 1),
        (Window(2, margin=0.15), [0, 0, 0, 0], [0.6, 0.7, 0.8, 0.7], 2),  # 0.6 is not beyond 0.65
        (Window(2), [0, 1, 1, 1], [0.9, 0.9, 0.9, 0.9], 2),  # a change of class empties the window
        (Window(2), [0, 0, 0, 0], [0.5, 0.5, 0.6, 0.6], 3),  # strictly beyond
        (Window(1), [0, 0, 0, 0], [0.6, 0.6, 0.6, 0.6], 0),
        (Window(2), [0, 0, 0, 0], [0.6, NAN, 0.6, 0.6], 3),
        (Window(2), [-1, -1, 0, 0], [NAN, NAN, 0.9, 0.9], 3),
        (Window(2, "monotone"), [0, 0, 0, 0], [0.8, 0.7, 0.7, 0.7], 2),  # equal does not fall
        (Window(2, "monotone", margin=0.2), [0, 0, 0, 0], [0.65, 0.9, 0.95, 0.9], 2),  # the first must be beyond
        (Window(2, "steady", spread=0.05), [0, 0, 0, 0], [0.8, 0.9, 0.92, 0.9], 2),
        (Window(2, "steady", spread=0.125), [0, 0, 0, 0], [0.75, 0.875, 0.9, 0.9], 1),  # a tie is steady
    ],
)
def test_window(policy, labels, probs, leaves):
    assert one(policy, 3, label=labels, prob=probs)[0] == leaves


def elbert_on_two_classes(kind, x, size, margin, spread):
    """The published rule on the probability of class 0, exit by exit."""
    for k in range(size - 1, len(x)):
        w = x[k - size + 1 : k + 1]
        above, below = all(p > 0.5 + margin for p in w), all(p < 0.5 - margin for p in w)
        if kind == "side" and (above or below):
            return k
        up = all(b >= a for a, b in pairwise(w))
        down = all(b <= a for a, b in pairwise(w))
        if kind == "monotone" and ((w[0] > 0.5 + margin and up) or (w[0] < 0.5 - margin and down)):
            return k
        if kind == "steady" and (above or below) and max(w) - min(w) <= spread:
            return k
    return len(x)


@pytest.mark.parametrize("kind", ["side", "monotone", "steady"])
@given(st.lists(st.integers(0, 64), min_size=1, max_size=8), st.integers(1, 4), st.sampled_from([0.0, 0.125, 0.25]))
@settings(deadline=None)
def test_window_is_elberts_rule_where_there_are_two_classes(kind, parts, size, margin):
    x = [p / 64 for p in parts]  # exact, so that both forms round alike
    labels, probs = [int(p < 0.5) for p in x], [max(p, 1 - p) for p in x]
    got = one(Window(size, kind, margin, 0.125), len(x), label=[*labels, 0], prob=[*probs, 0.0])[0]
    assert got == elbert_on_two_classes(kind, x, size, margin, 0.125)


def halting(scores, logits, policy=None):
    depths = [Evidence(torch.tensor([s]), logits=torch.tensor([z])) for s, z in zip(scores, logits, strict=True)]
    policy, exits = policy or Halting(), len(scores) - 1
    state = policy.start(1)
    for k, seen in enumerate(depths):
        at = At(k, k, exits)
        if policy.step(state, seen, at):
            return k, policy.answer(state, seen, at)
    raise AssertionError("full depth lets everything go")


def test_halting_weighs_the_logits_and_gives_the_rest_to_the_last():
    left, answer = halting([0.25, 0.5, 0.75, 0.0], [[4.0, 0.0], [0.0, 4.0], [8.0, 8.0], [0.0, 0.0]])
    assert left == 2  # 0.25 + 0.5 + 0.75 >= 0.99; weights 1/4, 1/2, 1/4
    assert answer.logits.tolist() == [[3.0, 4.0]] and answer.label.tolist() == [1]


def test_halting_at_the_first_exit_thanks_to_eps_and_at_full_depth_without():
    assert halting([0.995, 0.0], [[1.0, 2.0], [0.0, 0.0]])[0] == 0
    left, answer = halting([0.25, 0.25], [[4.0, 0.0], [0.0, 4.0]])
    assert left == 1 and answer.logits.tolist() == [[1.0, 3.0]]


def test_halting_passes_over_what_is_not_finite():
    left, answer = halting([NAN, 1.0, 0.0], [[NAN, 0.0], [2.0, 1.0], [0.0, 0.0]])
    assert left == 1 and answer.logits.tolist() == [[2.0, 1.0]]
    left, answer = halting([NAN, NAN], [[NAN, 0.0], [NAN, 0.0]])
    assert left == 1 and answer.label.tolist() == [-1]


@pytest.mark.parametrize(
    "policy,scores,labels,leaves",
    [
        (Accumulate(1.0), [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], 1),  # reached exactly
        (Accumulate(1.0), [0.5, 0.5, 0.5, 0.5], [0, 1, 1, 1], 2),  # a change of class starts afresh
        (Accumulate(0.5), [0.5, 0.0, 0.0, 0.0], [0, 1, 2, 0], 0),
        (Accumulate(2.0), [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], 3),
        (Accumulate(1.0), [0.75, NAN, 0.5, 0.5], [0, 0, 0, 0], 3),
        (Accumulate(1.0), [0.75, 0.75, 0.5, 0.5], [0, -1, 0, 0], 3),
        (Accumulate(1.0, (0.5, 1.5, 1.0)), [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], 1),  # 0.25 + 0.75
    ],
)
def test_accumulate(policy, scores, labels, leaves):
    assert one(policy, 3, score=scores, label=labels)[0] == leaves


def test_fixed_depth_and_its_schedule():
    depths = evidence(3, score=[0.0] * 4)
    assert play(FixedDepth(5), depths, layers=[3, 5, 8, 11])[0][0] == 1
    assert play(FixedDepth(4), depths, layers=[3, 5, 8, 11])[0][0] == 1  # the first exit behind it
    assert play(FixedDepth(9), depths, layers=[3, 5, 8, 11])[0][0] == 3
    falling = FixedDepth(Falling(8, 3, length=11))
    left = [play(falling, depths, position=Position(t, None), layers=[3, 5, 8, 11])[0][0] for t in (0, 6, 10, 50)]
    assert left == [2, 1, 0, 0] and left == sorted(left, reverse=True)


def test_oracle():
    assert one(Oracle(), 3, label=[0, 2, 1, 2], truth=[2] * 4)[0] == 1
    assert one(Oracle("label"), 3, label=[0, 1, 0, 2], truth=[2] * 4)[0] == 3
    assert one(Oracle(), 3, label=[-1, -1, -1, -1], truth=[-1] * 4)[0] == 3


def test_first_of_is_whoever_comes_first_and_each_keeps_its_own_memory():
    policy = FirstOf((Threshold(0.9), Patience(2), Patience(3)))
    assert one(policy, 4, score=[0.0, 0.95, 0.0, 0.0, 0.0], label=[0, 1, 0, 1, 0])[0] == 1
    assert one(policy, 4, score=[0.0] * 5, label=[0, 1, 1, 1, 0])[0] == 3
    skipping = FirstOf((Threshold(0.9, interval=2), Patience(3)))
    assert one(skipping, 4, score=[0.0, 0.95, 0.0, 0.0, 0.0], label=[1, 1, 1, 1, 0])[0] == 3


# ---- batch, alone, compacted


@dataclass(frozen=True)
class Case:
    policy: object

    def __repr__(self):
        return repr(self.policy)


CASES = [
    Case(p)
    for p in (
        Threshold(0.7),
        Threshold((0.9, 0.8, 0.7, 0.6, 0.5), strict=True),
        Threshold(0.9, fallback="most_confident"),
        Patience(2),
        Patience(2, tolerance=0.3),
        Vote(0.8, alpha=0.9),
        Window(2),
        Window(3, "monotone"),
        Window(2, "steady", margin=0.1),
        Halting(),
        Accumulate(1.2),
        FirstOf((Threshold(0.9), Window(2), Patience(2))),
        FixedDepth(2),
        Oracle(),
    )
]


def batch(seed, rows, exits=5):
    """Random evidence with ties, NaN rows, and classes that stay for a while."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(-3, 4, (exits + 1, rows, CLASSES), generator=g).float() * 0.75
    z = z.cumsum(0)
    z[torch.rand(exits + 1, rows, generator=g) < 0.05] = NAN
    prob, label = z.softmax(-1).max(-1)
    label = torch.where(prob.isnan(), -1, label)
    truth = label[-1].expand_as(label)
    return [Evidence(prob[k], label[k], prob[k], z[k], truth[k]) for k in range(exits + 1)]


@pytest.mark.parametrize("case", CASES, ids=repr)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_a_batch_decides_as_its_rows_alone_and_in_any_order(case, seed, rows):
    depths = batch(seed, rows)
    together = play(case.policy, depths)
    alone = [play(case.policy, [d.take(torch.tensor([i])) for d in depths])[0] for i in range(rows)]
    assert together == alone
    g = torch.Generator().manual_seed(seed)
    assert play(case.policy, depths, reorder=lambda n: torch.randperm(n, generator=g)) == together


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_random_batches_are_no_formality(case):
    left = {k for k, _ in play(case.policy, batch(0, 400))}
    assert left == {2} if isinstance(case.policy, FixedDepth) else len(left) > 2


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_no_rows_are_fine(case):
    assert play(case.policy, [d.take(torch.arange(0)) for d in batch(0, 3)]) == []


@pytest.mark.parametrize("case", [c for c in CASES if "score" in c.policy.needs], ids=repr)
@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf])
def test_scores_that_are_not_finite_never_leave(case, wrong):
    depths = [
        d._replace(
            score=torch.full_like(d.score, wrong), label=torch.full_like(d.label, -1), prob=torch.full_like(d.prob, NAN)
        )
        for d in batch(1, 50)
    ]
    assert {k for k, _ in play(case.policy, depths)} == {5}


# ---- bad input


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: Threshold(0.5, interval=0), "interval must be at least 1, got 0"),
        (lambda: Threshold(0.5, min_exit=-1), "min_exit must be a layer, 0 or larger, got -1"),
        (lambda: Threshold(0.5, fallback="best"), "'last' or 'most_confident', got 'best'"),
        (lambda: Threshold((0.5, 0.6)).check(0, 1, "max_prob", 3), "one for each of 3 exits, got 2"),
        (lambda: Threshold((0.5, 1.6)).check(0, 1, "max_prob"), r"must lie in 0\.\.1 for max_prob .* got 1\.6"),
        (lambda: Threshold(0.5, Decay()).step({}, Evidence(torch.ones(1)), At(0, 0, 1)), "positions, got none"),
        (lambda: Patience(0), "whole number from 1 on, got 0"),
        (lambda: Patience(1, tolerance=-1.0), "tolerance must be finite and larger than 0, got -1.0"),
        (lambda: Patience(3).check(0, 1, "x", 3), r"less than the number of exits \(3\), .* got 3"),
        (lambda: Vote(0.0), "share must be finite and larger than 0, got 0.0"),
        (lambda: Vote(1.0, alpha=2.0), r"alpha must lie in 0\.\.1, got 2.0"),
        (lambda: Vote(1.0).start(2), "expected the number of classes"),
        (lambda: Window(0), "size must be a whole number from 1 on, got 0"),
        (lambda: Window(2, "bias"), "'side', 'monotone' or 'steady', got 'bias'"),
        (lambda: Window(2, margin=0.5), "margin must lie in"),
        (lambda: Window(2, spread=2.0), "spread must lie in"),
        (lambda: Window(4).check(0, 1, "x", 3), r"at most the number of exits \(3\), got 4"),
        (lambda: Halting(0.0), "eps must lie between 0 and 1, got 0.0"),
        (lambda: Halting().check(-math.inf, 0, "neg_entropy"), r"within 0\.\.1, got neg_entropy with range -inf\.\.0"),
        (lambda: Accumulate(-1.0), "threshold must be larger than 0, got -1.0"),
        (lambda: Accumulate(1.0, [1.0, NAN]), "weights must be finite and not negative, got nan"),
        (lambda: Accumulate(1.0, [1.0]).check(0, 1, "max_prob", 2), "one weight for each of 2 exits, got 1"),
        (lambda: Accumulate(1.0).check(-1, 1, "saturation"), r"within 0\.\.1, got saturation"),
        (lambda: FixedDepth(-1), "must be a layer, 0 or larger, or a schedule, got -1"),
        (lambda: Falling(3, 5), "0 <= shallowest <= deepest, got 5 and 3"),
        (lambda: Falling(5, 3, length=0), "length must be at least 1, got 0"),
        (lambda: Falling(5, 3)(Position(1, None)), "give it a length"),
        (lambda: FixedDepth(Falling(5, 3)).leaves(At(0, 0, 1)), "positions, got none"),
        (lambda: Oracle("truth"), "'consistency' or 'label', got 'truth'"),
        (lambda: FirstOf(()), "expected policies, got none"),
        (lambda: FirstOf((Patience(1), Vote(1.0))), "answer with the exit's own label, got Vote"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
