"""Recordings out of .npz files that something else wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exeunt.evaluation import of_npz

LOGITS = np.random.default_rng(0).normal(size=(5, 3, 2))


def test_what_is_in_the_file_is_what_is_read(tmp_path):
    labels = np.array([0, 1, 1, 0, 1])
    np.savez(tmp_path / "a.npz", logits=LOGITS, labels=labels.astype(np.uint8), exits=np.array([3, 7]), layers=12)
    got = of_npz(tmp_path / "a.npz")
    assert (got.exits, got.layers, got.labels.tolist()) == ((3, 7), 12, labels.tolist())
    assert torch.equal(got.logits, torch.from_numpy(LOGITS).float())
    np.savez(tmp_path / "b.npz", logits=LOGITS.astype(np.float16), labels=labels == 1)
    assert of_npz(tmp_path / "b.npz").labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    "arrays,message",
    [
        ({"exits": 3}, r"must have exits \[2\] of whole numbers, got \[\] of int64$"),
        ({"exits": [3]}, r"must have exits \[2\] of whole numbers, got \[1\] of int64$"),
        ({"layers": [12]}, r"must have layers \[\] of whole numbers, got \[1\] of int64$"),
        ({"labels": list("abcde")}, r"must have labels \[5\] of whole numbers, got \[5\] of <U1$"),
        ({"labels": [0.0, 1.0, 0.5, 1.0, 0.0]}, r"must have labels \[5\] of whole numbers, got \[5\] of float64$"),
        ({"labels": [0, 1]}, r"must have labels \[5\] of whole numbers, got \[2\] of int64$"),
        ({"logits": LOGITS.astype(str)}, r"must have logits \[n, exits \+ 1, classes\], n 1 or more, of numbers, got"),
        ({"logits": LOGITS[:0]}, r"n 1 or more, of numbers, got \[0, 3, 2\] of float64$"),
        ({"logits": LOGITS[0]}, r"n 1 or more, of numbers, got \[3, 2\] of float64$"),
    ],
)
def test_other_arrays_are_refused_in_one_sentence(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **{"logits": LOGITS, **arrays})
    with pytest.raises(ValueError, match=message) as caught:
        of_npz(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)
