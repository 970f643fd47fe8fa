"""compact and expand against their specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exeunt import ops, reference

masks = st.lists(st.booleans(), max_size=40).map(lambda bits: torch.tensor(bits, dtype=torch.bool))


@given(masks)
@settings(deadline=None)
def test_equals_the_specification(mask):
    n = len(mask)
    state = {"streak": torch.arange(n), "scores": (torch.rand(n, 3), None)}
    tensors = torch.rand(n), torch.rand(n, 2, 5), state
    rows, count, *moved = ops.compact(mask, *tensors)
    want_rows, want_count, *want = reference.compact(mask, *tensors)
    assert torch.equal(rows, want_rows) and torch.equal(count, want_count) and rows.dtype == torch.int64
    assert torch.equal(moved[0], want[0]) and torch.equal(moved[1], want[1])
    assert torch.equal(moved[2]["streak"], want[2]["streak"]) and moved[2]["scores"][1] is None
    assert torch.equal(moved[2]["scores"][0], want[2]["scores"][0])

    # Stable: what was chosen comes first, in its order.
    assert rows[: int(count)].tolist() == mask.nonzero().flatten().tolist()
    assert rows[int(count) :].tolist() == (~mask).nonzero().flatten().tolist()

    into = torch.rand(n, 2, 5)
    kept = into.clone()
    back = ops.expand(rows, count, moved[1], into)
    assert torch.equal(back, reference.expand(rows, count, moved[1], into)) and torch.equal(into, kept)
    assert torch.equal(back, torch.where(mask[:, None, None], tensors[1], into))


def test_rows_not_chosen_may_hold_anything():
    mask = torch.tensor([True, False, True])
    rows, count, x = ops.compact(mask, torch.ones(3))
    x[2] = float("nan")
    assert ops.expand(rows, count, x, torch.zeros(3)).tolist() == [1.0, 0.0, 1.0]


def test_gradients_flow_back_to_their_rows():
    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([False, True, False, True])

    def there_and_back(x):
        rows, count, y = ops.compact(mask, x)
        return ops.expand(rows, count, y * y, torch.zeros_like(x))

    assert torch.autograd.gradcheck(there_and_back, x)


def test_traces_without_a_break():
    def double_chosen(mask, x):
        rows, count, y = ops.compact(mask, x)
        return ops.expand(rows, count, 2 * y, x)

    mask, x = torch.tensor([True, False, True]), torch.tensor([1.0, 2.0, 3.0])
    compiled = torch.compile(double_chosen, fullgraph=True, backend="eager")
    assert torch.equal(compiled(mask, x), torch.tensor([2.0, 2.0, 6.0]))


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match=r"mask must be \[N\] bool, got \[2\] torch.int64"):
        ops.compact(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"expected tensors of 2 rows like the mask, got \[3, 1\]"):
        ops.compact(torch.tensor([True, False]), torch.zeros(3, 1))
    rows, count, x = ops.compact(torch.tensor([True, False]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"with 2 rows, got \[2\] torch.float32 and \[2\] torch.float64"):
        ops.expand(rows, count, x, torch.zeros(2, dtype=torch.float64))
