"""Turn the JSON of a benchmark run into the Markdown table that README and docs quote.

`python benchmarks/table.py FILE ...` prints medians in milliseconds and each peer's time as a multiple of exeunt's; for
runs that compare two sides in turns (bench_end_to_end.py) the median ratio of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def setup(results: dict) -> str:
    """Where the figures come from, and what they are."""
    machine = results["machine_info"]["cpu"].get("brand_raw", results["machine_info"]["machine"])
    return f"{machine}, {results['benchmarks'][0]['extra_info']['threads']} threads, medians in ms"


def table(results: dict) -> str:
    """Markdown table of bench_exit_stats.py, one row a shape."""
    lines = [
        f"{setup(results)}. Floor: the slower of one read of the head (r) and its "
        "multiply-adds (m); in brackets the part of its speed that is reached. torch: in brackets times exeunt's, as "
        "the head lies and packed; peers: full logits, softmax, top 2, likewise. Ratios are medians of a turn's.",
        "",
        "| V x D | dtype | pages | rows | floor | exeunt | packed | int8 | torch | torch.compile | peers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for b in results["benchmarks"]:
        info = b["extra_info"]
        t, ratio = info["sides"], info["ratios"]
        cells = [f"{info['floor']:.3g} {info['bound'][0]}"]
        cells += [f"{t[side]:.3g} ({ratio[f'floor / {side}']:.2f})" for side in ("exeunt", "packed")]
        cells.append(f"{t['int8']:.3g}")
        for peer in ("torch", "torch.compile", "peers"):
            times = ", ".join(f"{ratio[f'{peer} / {side}']:.2f}x" for side in ("exeunt", "packed"))
            cells.append(f"{t[peer]:.3g} ({times})")
        case = f"{info['v']} x {info['d']} | {info['dtype']} | {info['pages']} | {info['n']}"
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fills(results: dict) -> str:
    """Markdown table of bench_kv_fill.py, one row a case."""
    lines = [
        f"{setup(results)}. Floor: one read of the weights; in tiles: 16 rows at a time, as they lie; in brackets the "
        "parts of their speed that are reached. Packed: over a packed copy. Others: in brackets times kv_fill's.",
        "",
        "| 16 layers, D=2048, 8 heads of 64 | pages | floor | in tiles | kv_fill | packed | one by one | torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for b in results["benchmarks"]:
        t = b["extra_info"]["sides"]
        ours = t["kv_fill"]
        tiles = t["floor in tiles"]
        cells = [f"{t['floor']:.3g}", f"{tiles:.3g}", f"{ours:.3g} ({t['floor'] / ours:.2f}, {tiles / ours:.2f})",
                 f"{t['packed']:.3g} ({t['floor'] / t['packed']:.2f})"]  # fmt: skip
        cells += [f"{t[peer]:.3g} ({t[peer] / ours:.2f}x)" for peer in ("one by one", "torch")]
        lines.append(f"| {b['extra_info']['fill']} | {b['extra_info']['pages']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def checks(results: dict) -> str:
    """Markdown table of bench_small_head.py, one row a case."""
    lines = [
        f"{setup(results).replace(' in ms', ' in us')}. Floor: one read of the (largest) weight. torch: in brackets "
        "times exeunt's.",
        "",
        "| check | floor | exeunt | torch |",
        "|---|---|---|---|",
    ]
    for b in results["benchmarks"]:
        t = b["extra_info"]["sides"]
        cells = f"{t['floor']:.1f} | {t['exeunt']:.1f} | {t['torch']:.1f} ({t['torch'] / t['exeunt']:.2f}x)"
        lines.append(f"| {b['extra_info']['check']} | {cells} |")
    return "\n".join(lines)


def attention(results: dict) -> str:
    """Markdown table of bench_ragged_attention.py, one row a case."""
    lines = [
        f"{setup(results)}. Floor: one read of the keys and values that are there; in brackets the part of its speed "
        "that is reached. sdpa: in brackets times ragged_attention's.",
        "",
        "| 32 heads over 8 of 64 | floor | ragged_attention | sdpa, grouped | sdpa, repeated |",
        "|---|---|---|---|---|",
    ]
    for b in results["benchmarks"]:
        t = b["extra_info"]["sides"]
        ours = t["ragged_attention"]
        cells = [f"{t['floor']:.3g}", f"{ours:.3g} ({t['floor'] / ours:.2f})"]
        cells += [f"{t[peer]:.3g} ({t[peer] / ours:.2f}x)" for peer in ("sdpa, grouped", "sdpa, repeated")]
        lines.append(f"| {b['extra_info']['attention']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairs(results: dict) -> str:
    """Markdown table of comparisons of two sides that ran in turns, one row a case."""
    clock = next(b["extra_info"]["clock"] for b in results["benchmarks"] if "clock" in b["extra_info"])
    terms = "speed: times the other side's; allowed: by bytes, or by a model cut to those layers."
    lines = [f"{setup(results)} a token ({clock}); {terms}", ""]
    lines += ["| case | other side | exeunt | speed | allowed |", "|---|---|---|---|---|"]
    for b in results["benchmarks"]:
        info = b["extra_info"]
        if "layer" in info:
            lines.append(f"| {info['layer']} | loop alone {info['loop alone']:.1f} | {info['exeunt']:.1f} | | |")
            continue
        (name, other), (_, ours), *_ = info["sides"].items()
        allowed = f"{info['expected']:.2f}x" if info["expected"] else ""
        lines.append(f"| {info['case']} | {name} {other:.1f} | {ours:.1f} | {info['speed']:.2f}x | {allowed} |")
    return "\n".join(lines)


def run(file: str) -> dict:
    """The results in a file."""
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected what pytest --benchmark-json wrote, got {file} ({error})") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=run, nargs="+", metavar="FILE", help="what pytest --benchmark-json wrote")
    runs = parser.parse_args().runs
    results = runs[0] | {"benchmarks": [b for run in runs for b in run["benchmarks"]]}
    info = results["benchmarks"][0]["extra_info"]
    kinds = {"speed": pairs, "fill": fills, "attention": attention, "check": checks}
    print(next((kind for name, kind in kinds.items() if name in info), table)(results))
