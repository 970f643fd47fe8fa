"""The report: one self-contained HTML page, and its pictures as PNG files."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from exeunt import files
from exeunt.confidence import measure
from exeunt.evaluation.sweep import baselines, frontier, sweep
from exeunt.picture import colour
from exeunt.replay import Recording, Replay

__all__ = ["report"]

BINS = 10  # of a reliability curve
WORDS = 400  # of a depth map

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }} table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} tr:nth-child(even) {{ background: #f4f4f4 }}
.words span {{ padding: 1px 2px; border-radius: 3px }} .note {{ color: #666 }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def report(
    recording: Recording,
    folder: str | os.PathLike[str],
    *,
    title: str = "Early exit: every rule on one recording",
    points: int = 50,
    consistency: float = 0.95,
    words: Sequence[str] | None = None,
    live: Callable[[Replay], str] | None = None,
    advance: Callable[[str], None] | None = None,
) -> Path:
    """Write ``index.html`` and PNG files: what every recipe would do on recorded data.

    Quality against speed, how deep rows go, the gap to an oracle, how far each exit's confidence can be believed, and,
    where words are given, the depth of each.

    Parameters
    ----------
    recording : Recording
        Quality is accuracy where it has labels, else agreement with full depth.
    folder : path
        Where to; made if it is not there.
    title : str
        Of the page.
    points : int, default 50
        Operating points of a recipe.
    consistency : float, default 0.95
        Share of answers as at full depth at which recipes are compared.
    words : sequence of str, optional
        The text of each row, for the depth map.
    live : callable, optional
        Told the estimate with the fewest layers, it says in a sentence how a live run compares
        (:func:`exeunt.evaluation.live_check`).
    advance : callable, optional
        Told the name of each part when it is done.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ImportError
        Without matplotlib.

    Examples
    --------
    >>> import tempfile, torch
    >>> from exeunt.evaluation import report
    >>> from exeunt.replay import Recording
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = report(Recording.of_logits(torch.randn(50, 4, 3).cumsum(1)), folder, points=3)
    ...     sorted(p.name for p in page.parent.iterdir())
    ['depths.png', 'index.html', 'oracle.png', 'quality.png', 'reliability.png']
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise ImportError("a report needs matplotlib: pip install exeunt[demo]") from missing
    if words is not None and len(words) != len(recording):
        raise ValueError(f"words must be one for each of {len(recording)} rows, got {len(words)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = advance or (lambda part: None)
    curves, known = sweep(recording, points), baselines(recording)
    said("replays")
    best = {name: _best(curve, consistency) for name, curve in curves.items()}
    pictures: dict[str, tuple[str, Callable[[Any], None]]] = {
        "quality": ("Quality against speed", lambda axes: _quality(axes, recording, curves, known)),
        "depths": ("How deep rows go", lambda axes: _depths(axes, recording, best, consistency)),
        "oracle": ("The gap to an oracle", lambda axes: _oracle(axes, best, known, consistency)),
        "reliability": ("What an exit's confidence is worth", lambda axes: _reliability(axes, recording)),
    }
    body = [f"<p>{_about(recording)}</p>", _table(recording, best, consistency)]
    estimates = {name: r for name, r in best.items() if r is not None and not r.exact}
    if estimates:
        name, estimate = min(estimates.items(), key=lambda item: item[1].mean_layers)
        held = "Hold a live run against them." if live is None else f"{name}: {live(estimate)}"
        body.append(f'<p class="note">Estimates: {html.escape(estimate.why)}. {html.escape(held)}</p>')
    for name, (heading, draw) in pictures.items():
        png = _png(draw)
        files.write(folder / f"{name}.png", png)
        encoded = base64.b64encode(png).decode()
        body.append(f'<h2>{heading}</h2>\n<img alt="{heading}" src="data:image/png;base64,{encoded}">')
        said(name)
    if words is not None:
        body.append(_map(recording, best, words))
    files.write(folder / "index.html", PAGE.format(title=html.escape(title), body="\n".join(body)).encode())
    return folder / "index.html"


def _good(replayed: Replay) -> float:
    return replayed.consistency if replayed.recording.labels is None else replayed.accuracy


def _best(curve: list[Replay], consistency: float) -> Replay | None:
    """The point with the fewest layers that answers as full depth often enough."""
    return next((r for r in curve if r.consistency >= consistency), None)


def _fastest(best: dict[str, Replay | None]) -> tuple[str, Replay] | None:
    found = [(name, r) for name, r in best.items() if r is not None]
    return min(found, key=lambda item: item[1].mean_layers, default=None)


def _about(recording: Recording) -> str:
    truth = "with labels" if recording.labels is not None else "without labels: quality is agreement with full depth"
    kind = "rows" if recording.positions is None else "tokens"
    exits = ", ".join(map(str, recording.exits))
    return (
        f"{len(recording):,} {kind} {truth}, {recording.classes:,} classes, {recording.layers} layers, exits {exits} "
        "(0 is after the first layer). Speed is layers of the model over layers run: an upper bound for what a clock "
        "shows, which pays for checks too (see exeunt.evaluation.plan)."
    )


def _table(recording: Recording, best: dict[str, Replay | None], consistency: float) -> str:
    labelled = recording.labels is not None
    head = ["recipe", "layers", "speed", "as full depth", *(["right"] if labelled else []), "replay"]
    lines = [f"<h2>At {consistency:.0%} of answers as at full depth</h2>", "<table>", _row("th", head)]
    ordered = sorted(best.items(), key=lambda item: item[1].mean_layers if item[1] else recording.layers + 1)
    for name, r in ordered:
        if r is None:
            lines.append(_row("td", [name, "never", *[""] * (len(head) - 2)]))
            continue
        right = [f"{r.accuracy:.1%}"] if labelled else []
        exact = "exact" if r.exact else "estimate"
        lines.append(
            _row("td", [name, f"{r.mean_layers:.2f}", f"{r.speedup:.2f}x", f"{r.consistency:.1%}", *right, exact])
        )
    lines.append("</table>")
    return "\n".join(lines)


def _row(cell: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{html.escape(t)}</{cell}>" for t in texts) + "</tr>"


def _png(draw: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
    draw(figure.subplots())
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _quality(axes: Any, recording: Recording, curves: dict[str, list[Replay]], known: dict[str, list[Replay]]) -> None:
    markers = "osv^D<>pP*Xhd"
    for i, (name, curve) in enumerate(curves.items()):
        front = frontier(curve, _good)
        x, y = [r.speedup for r in front], [100 * _good(r) for r in front]
        axes.plot(x, y, marker=markers[i % len(markers)], markersize=3, linewidth=1, label=name)
    fixed = known["fixed depth"]
    axes.plot([r.speedup for r in fixed], [100 * _good(r) for r in fixed], "k--", linewidth=1, label="fixed depth")
    for name in ("oracle, as full depth", "oracle, right"):
        for r in known.get(name, []):
            axes.plot([r.speedup], [100 * _good(r)], "k*" if "right" in name else "kP", markersize=9, label=name)
    axes.set_xlabel("layers of the model / layers run")
    axes.set_ylabel("accuracy, %" if recording.labels is not None else "answers as at full depth, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)


def _depths(axes: Any, recording: Recording, best: dict[str, Replay | None], consistency: float) -> None:
    found = sorted(((r.mean_layers, name, r) for name, r in best.items() if r is not None), key=lambda t: t[:2])[:4]
    width = 0.8 / max(len(found), 1)
    for i, (_, name, r) in enumerate(found):
        share = torch.bincount(r.depth, minlength=recording.layers).double() / len(r.depth)
        places = [layer + 1 + (i - (len(found) - 1) / 2) * width for layer in range(recording.layers)]
        axes.bar(places, (100 * share).tolist(), width, label=f"{name}: {r.mean_layers:.2f} layers")
    axes.set_xlabel("layers run")
    axes.set_ylabel("rows, %")
    axes.set_title(f"the four with fewest layers at {consistency:.0%} of answers as at full depth", fontsize=9)
    if found:
        axes.legend(fontsize=8)


def _oracle(axes: Any, best: dict[str, Replay | None], known: dict[str, list[Replay]], consistency: float) -> None:
    found = sorted(((r.mean_layers, name) for name, r in best.items() if r is not None), reverse=True)
    names = [name for _, name in found] + [name for name in known if name.startswith("oracle")]
    layers = [m for m, _ in found] + [known[name][0].mean_layers for name in known if name.startswith("oracle")]
    axes.barh(names, layers, color=["#4878a8"] * len(found) + ["#d8a13a"] * (len(names) - len(found)))
    axes.set_xlabel(f"mean layers at {consistency:.0%} of answers as at full depth")
    axes.tick_params(axis="y", labelsize=8)


def _reliability(axes: Any, recording: Recording) -> None:
    """For each exit: how often rows with this much confidence answer right."""
    columns = tuple(range(len(recording.exits) + 1))
    scores = recording.scores(measure("max_prob"), columns)
    truth = recording.predicted[:, -1] if recording.labels is None else recording.labels
    for k, c in enumerate(columns):
        last = c == len(recording.exits)
        if last and recording.labels is None:
            continue  # full depth always agrees with itself
        usable = scores[k].isfinite()
        s, right = scores[k][usable], (recording.predicted[:, c] == truth)[usable].double()
        bins = (s * BINS).long().clamp(0, BINS - 1)
        count = torch.bincount(bins, minlength=BINS)
        enough = count > 0
        x = torch.bincount(bins, s.double(), BINS)[enough] / count[enough]
        y = torch.bincount(bins, right, BINS)[enough] / count[enough]
        label = "full depth" if last else f"exit {recording.exits[c]}"
        axes.plot((100 * x).tolist(), (100 * y).tolist(), marker="o", markersize=3, linewidth=1, label=label)
    axes.plot([0, 100], [0, 100], "k:", linewidth=1)
    axes.set_xlabel("largest probability, %")
    axes.set_ylabel("right, %" if recording.labels is not None else "as at full depth, %")
    axes.legend(fontsize=7)


def _map(recording: Recording, best: dict[str, Replay | None], words: Sequence[str]) -> str:
    """Every word on a colour that says how deep it went."""
    chosen = _fastest(best)
    if chosen is None:
        return ""
    name, r = chosen
    spans = []
    for word, depth in list(zip(words, r.depth.tolist(), strict=True))[:WORDS]:
        shade = colour(depth + 1, recording.layers)
        spans.append(f'<span style="background:{shade}" title="{depth + 1} layers">{html.escape(word)}</span>')
    return (
        f"<h2>Depth of each word</h2>\n<p>{html.escape(name)}, {r.mean_layers:.2f} of {recording.layers} layers: warm "
        f'words left early, grey ones at full depth.</p>\n<p class="words">{" ".join(spans)}</p>'
    )
