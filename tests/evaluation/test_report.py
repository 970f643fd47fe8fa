"""The report: one page that needs no other file, pictures beside it, and the figures of the replays."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="a report needs matplotlib")

from exeunt import cli
from exeunt.evaluation import of_npz, record, report, sweep
from exeunt.replay import Recording

PICTURES = ("depths", "oracle", "quality", "reliability")


def recording(n=150, **more):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 5, 3, generator=g).cumsum(1)
    return Recording.of_logits(z, **{"labels": torch.randint(3, (n,), generator=g), **more})


def test_page_stands_alone_and_pictures_lie_beside_it(tmp_path):
    parts = []
    page = report(recording(), tmp_path / "out", points=4, title="A <title>", advance=parts.append)
    text = page.read_text()
    assert "A &lt;title&gt;" in text and parts == ["replays", "quality", "depths", "oracle", "reliability"]
    assert len(re.findall(r'src="data:image/png;base64,', text)) == len(PICTURES)
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for name in PICTURES:
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_the_figures_of_the_replays(tmp_path):
    rec = recording()
    text = report(rec, tmp_path, points=6, consistency=0.9).read_text()
    for name, curve in sweep(rec, 6).items():
        best = next((r for r in curve if r.consistency >= 0.9), None)
        if best is None:
            assert f"<td>{name}</td><td>never</td>" in text
        else:
            figures = f"<td>{best.mean_layers:.2f}</td><td>{best.speedup:.2f}x</td><td>{best.consistency:.1%}</td>"
            assert f"<td>{name}</td>{figures}<td>{best.accuracy:.1%}</td><td>exact</td>" in text


def test_words_of_a_generation(tmp_path):
    tokens = recording(labels=None, positions=torch.arange(150) % 30, limit=30)
    words = [f"w{i}<" for i in range(150)]
    text = report(tokens, tmp_path, points=4, consistency=0.5, words=words).read_text()
    assert text.count('layers">w') == 150 and "w149&lt;" in text and "estimate" in text
    with pytest.raises(ValueError, match="words must be one for each of 150 rows, got 1"):
        report(tokens, tmp_path, words=["a"])


def test_an_estimate_is_held_against_a_live_run(tmp_path):
    tokens, asked = recording(labels=None, positions=torch.arange(150) % 30, limit=30), []

    def live(estimate):
        asked.append(estimate)
        return "Live: <as told>"

    text = report(tokens, tmp_path, points=4, consistency=0.5, live=live).read_text()
    assert "Live: &lt;as told&gt;" in text and len(asked) == 1 and not asked[0].exact
    least = min(r.mean_layers for curve in sweep(tokens, 4).values() for r in curve
                if r.consistency >= 0.5 and not r.exact)  # fmt: skip
    assert asked[0].mean_layers == least
    assert "live" not in report(recording(), tmp_path, points=4, live=live).read_text().lower() and len(asked) == 1


def test_command_line_reads_a_text_with_a_model(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("Return the number of items in the list. " * 60)
    out = tmp_path / "out"
    arguments = ["--model", "small", "--data", tmp_path / "text.txt", "--exits", "5,7", "--out", out, "--points", 3]
    status, said = run(capsys, *arguments, "--tokens", 256, "--consistency", 0.5)
    page = (out / "index.html").read_text()
    assert status == 0 and "Live, " in said.out and "generated tokens" in page
    assert "Depth of each word" in page and page.count(' layers">') == 2 * (128 - 16 - 1)
    assert 'layers"> number</span>' in page or 'layers">number</span>' in page
    for wrong, message in (
        (arguments[:4], "--model needs --data and --exits"),
        ([], "expected a --recording, or a --model with --data and --exits"),
    ):
        status, said = run(capsys, *wrong, "--out", out)
        assert status == 2 and message in said.err


@pytest.mark.parametrize(
    "options,message",
    [
        ({"--exits": "40"}, "exits must lie in 0..10 for a model of 12 layers, got [40]"),
        ({"--exits": "5,11"}, "exits must lie in 0..10 for a model of 12 layers, got [5, 11]"),
        ({"--exits": "-1"}, "exits must lie in 0..10 for a model of 12 layers, got [-1]"),
        ({"--tokens": "100"}, "--tokens must be 128 or more, got 100"),
    ],
)
def test_what_a_model_cannot_record_is_refused_before_it_runs(tmp_path, capsys, monkeypatch, options, message):
    pytest.importorskip("transformers")
    monkeypatch.setattr("exeunt.evaluation.tokens.tracked", lambda *args: pytest.fail("it ran"))
    (tmp_path / "text.txt").write_text("Return the number of items in the list. " * 60)
    given = {"--model": "small", "--data": tmp_path / "text.txt", "--exits": "5", "--out": tmp_path / "out", **options}
    status, said = run(capsys, *(part for pair in given.items() for part in pair))
    assert status == 2 and message in said.err and said.err.count("\n") == 1


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "logits.npz", logits=np.zeros((5, 3, 2)))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        status, said = run(capsys, "--recording", tmp_path / "logits.npz", "--out", out)
        assert status == 2 and f"--out must be a folder, got {out}: {tmp_path / 'file'} is a file\n" in said.err


def run(capsys, *args):
    status = cli.main(["evaluate", *map(str, args)])
    return status, capsys.readouterr()


def test_command_line_on_a_recording_and_on_an_npz(tmp_path, capsys):
    logits = torch.randn(20, 4, 2).cumsum(1)
    record(lambda units: logits[[int(u) for u in units]], [str(i) for i in range(20)], tmp_path / "rec",
           exits=[0, 1, 2], layers=4, progress=False)  # fmt: skip
    np.savez(tmp_path / "logits.npz", logits=logits.numpy(), labels=np.zeros(20, int), exits=[1, 3, 5], layers=9)
    assert of_npz(tmp_path / "logits.npz").exits == (1, 3, 5) and of_npz(tmp_path / "logits.npz").layers == 9
    for source in ("rec", "logits.npz"):
        out = tmp_path / f"out {source}"
        status, said = run(capsys, "--recording", tmp_path / source, "--out", out, "--points", 3)
        assert status == 0 and said.out == f"wrote {out / 'index.html'}\n" and (out / "index.html").exists()


@pytest.mark.parametrize(
    "args,message",
    [
        (["--consistency", "2"], "--consistency must lie in 0..1, larger than 0, got 2"),
        ([], "must be a recording, or an .npz file with logits"),
        (["--points", "0"], "expected a whole number from 1 on, got '0'"),
    ],
)
def test_command_line_refuses_in_one_sentence(tmp_path, capsys, args, message):
    (tmp_path / "other.npz").write_bytes(b"PK")
    arguments = ["--recording", tmp_path / "other.npz", "--out", tmp_path / "out", *args]
    try:
        status, said = run(capsys, *arguments)
    except SystemExit as left:
        status, said = left.code, capsys.readouterr()
    assert status == 2 and message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
