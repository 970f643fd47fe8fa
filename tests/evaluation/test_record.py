"""Recordings on disk: resumed, appended, refused where they belong to something else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from exeunt.calibration import fingerprints
from exeunt.classifier_heads import ClassifierHeads, LinearHead
from exeunt.evaluation import load, record
from exeunt.evaluation import record as package_record
from exeunt.evaluation.record import CHUNK
from exeunt.recipes import fastbert, pabee
from exeunt.replay import Recording, replay

assert package_record is record
EXITS, LAYERS, CLASSES = (1, 3), 6, 3


def logits(units):
    """Logits that depend on the unit alone."""
    rows = [torch.randn(len(EXITS) + 1, CLASSES, generator=torch.Generator().manual_seed(int(u))) for u in units]
    return torch.stack(rows)


class Run:
    """Counts what is run, and is killed after some calls."""

    def __init__(self, dies_after=None, heads=None):
        self.units, self.calls, self.dies_after, self.heads = [], 0, dies_after, heads

    def __call__(self, units):
        if self.calls == self.dies_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.units += units
        return logits(units), {"probe": logits(units).sigmoid()[..., 0]}


def make(folder, units, run=None, **more):
    settings = {"exits": EXITS, "layers": LAYERS, "progress": False, **more}
    return record(run or Run(), [str(u) for u in units], folder, **settings)


def model(seed=0, layers=LAYERS):
    torch.manual_seed(seed)
    made = nn.Linear(4, 4)
    made.config = SimpleNamespace(
        model_type="bert", hidden_size=4, num_hidden_layers=layers, num_attention_heads=1, vocab_size=9
    )
    return made


def test_what_is_read_is_what_was_run(tmp_path):
    units = range(CHUNK + 70)
    got = make(tmp_path, units, labels=[u % CLASSES for u in units])
    expected = Recording.of_logits(logits(units), exits=EXITS, layers=LAYERS)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.statistics, expected.statistics)
    assert got.labels.tolist() == [u % CLASSES for u in units]
    assert torch.equal(got.measures["probe"], expected.logits.sigmoid()[..., 0])
    assert torch.equal(replay(got, fastbert(0.7)).exit, replay(expected, fastbert(0.7)).exit)


def test_goes_on_behind_the_last_chunk_and_appends(tmp_path):
    units, calls = list(range(2 * CHUNK + 30)), CHUNK // 32 + 3
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, units, Run(dies_after=calls))
    again = Run()
    whole = make(tmp_path, units, again)
    assert again.units == [str(u) for u in units[CHUNK:]]  # the chunk that was whole is not run again
    more = Run()
    longer = make(tmp_path, [*units, 7000, 7001], more)
    assert more.units == ["7000", "7001"]
    assert torch.equal(longer.statistics[:-2], whole.statistics)
    assert torch.equal(longer.logits, logits([*units, 7000, 7001]))
    nothing = Run()
    assert len(make(tmp_path, [*units, 7000, 7001], nothing)) == len(longer) and not nothing.units


def test_many_classes_keep_statistics_alone(tmp_path):
    run = lambda units: torch.randn(len(units), 3, 65)  # noqa: E731
    got = record(run, ["a", "b"], tmp_path, exits=EXITS, layers=LAYERS, progress=False)
    assert got.logits is None and got.classes == 65 and replay(got, pabee(1)).exit.shape == (2,)


def test_belongs_to_its_model(tmp_path):
    make(tmp_path, range(3), model=model())
    assert len(load(tmp_path, model=model())) == 3
    with pytest.raises(ValueError, match="holds a recording of another model"):
        load(tmp_path, model=model(seed=1))
    with pytest.raises(ValueError, match="holds a recording of another model"):
        make(tmp_path, range(3), model=model(layers=7))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"units": [0, 5, 2]}, "of other data: unit 1 differs"),
        ({"units": [0, 1]}, "of other data: it has 3 units, got 2"),
        ({"exits": (1, 4)}, "of other exits: expected"),
        ({"layers": 7}, "of a model of other depth: expected 7, got 6"),
        ({"units": range(4), "labels": [1]}, "labels must be one for each of 4 units, got 1"),
        ({"units": range(4), "run": lambda u: torch.zeros(len(u), 2, 2)}, r"must return logits \[1, 3, classes\]"),
    ],
)
def test_refuses_in_one_sentence(tmp_path, change, message):
    make(tmp_path, range(3))
    settings = {"units": range(3), **change}
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_what_is_no_recording(tmp_path):
    with pytest.raises(ValueError, match="holds no exeunt recording of version 2"):
        load(tmp_path)
    with pytest.raises(ValueError, match="expected units, got none"):
        make(tmp_path / "none", [])
    make(tmp_path / "damaged", range(3))
    (tmp_path / "damaged" / "rows-0000000.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is a damaged recording: rows-0000000.npz"):
        load(tmp_path / "damaged")
    make(tmp_path / "mixed", range(3))
    with pytest.raises(ValueError, match="hold different things"):
        make(tmp_path / "mixed", range(4), logits)


def test_belongs_to_its_exit_heads(tmp_path):
    first, second = (ClassifierHeads({e: LinearHead(4, CLASSES) for e in EXITS}) for _ in range(2))
    make(tmp_path, range(3), Run(heads=first))
    assert make(tmp_path, range(4), Run(heads=first)).about["heads"] == fingerprints.of_heads(first)
    for run in (Run(heads=second), Run()):
        with pytest.raises(ValueError, match="holds a recording of other exit heads"):
            make(tmp_path, range(5), run)
        assert not run.units


def test_labels_may_come_later_and_do_not_change(tmp_path):
    run = Run()
    assert make(tmp_path, range(3), run).labels is None
    assert make(tmp_path, range(3), run, labels=[0, 1, 2]).labels.tolist() == [0, 1, 2]
    assert make(tmp_path, range(3), run).labels.tolist() == [0, 1, 2] and len(run.units) == 3
    for change, message in (
        ({"labels": [0, 2, 2]}, "other labels: expected 1 for unit 1, got 2"),
        ({"units": range(5), "labels": [1, 1, 2, 0, 0]}, "other labels: expected 0 for unit 0, got 1"),
        ({"units": range(5)}, "with labels: expected 5 labels for its units, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **{"units": range(3), "run": run, **change})
    assert len(run.units) == 3, "nothing is run before labels are compared"
    assert make(tmp_path, range(5), run, labels=[0, 1, 2, 0, 1]).labels.tolist() == [0, 1, 2, 0, 1]
    unlabelled = tmp_path / "unlabelled"
    make(unlabelled, range(3))
    assert make(unlabelled, range(4), labels=[2, 2, 2, 1]).labels.tolist() == [2, 2, 2, 1]


def test_index_is_json(tmp_path):
    make(tmp_path, range(3))
    assert json.loads((tmp_path / "recording.json").read_text())["chunks"] == [0]
