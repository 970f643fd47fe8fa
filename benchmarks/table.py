"""Turn the JSON of a benchmark run into the Markdown table that README and docs quote.

`python benchmarks/table.py FILE` prints medians in milliseconds and each peer's time as a multiple of exeunt's; for
runs that compare two sides in turns (bench_end_to_end.py) the median ratio of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def table(results: dict) -> str:
    """Markdown table of a pytest-benchmark result, one row a shape."""
    rows: dict[tuple, dict[str, float]] = {}
    for b in results["benchmarks"]:
        info = b["extra_info"]
        rows.setdefault((info["v"], info["d"], info["dtype"], info["n"]), {})[info["side"]] = b["stats"]["median"] * 1e3
    peers = [s for s in next(iter(rows.values())) if s != "exeunt"]
    threads = results["benchmarks"][0]["extra_info"]["threads"]
    machine = results["machine_info"]["cpu"].get("brand_raw", results["machine_info"]["machine"])
    lines = [f"{machine}, {threads} threads, medians in ms; in brackets: times exeunt's.", ""]
    lines.append("| V x D | dtype | rows | exeunt | " + " | ".join(peers) + " |")
    lines.append("|---|---|---|---|" + "---|" * len(peers))
    for (v, d, dtype, n), t in rows.items():
        ours = t["exeunt"]
        cells = " | ".join(f"{t[p]:.2f} ({t[p] / ours:.2f}x)" for p in peers)
        lines.append(f"| {v} x {d} | {dtype} | {n} | {ours:.2f} | {cells} |")
    return "\n".join(lines)


def pairs(results: dict) -> str:
    """Markdown table of comparisons of two sides that ran in turns, one row a case."""
    first = results["benchmarks"][0]["extra_info"]
    machine = results["machine_info"]["cpu"].get("brand_raw", results["machine_info"]["machine"])
    setup = f"{machine}, {first['threads']} threads, medians in ms a token ({first['clock']})"
    lines = [f"{setup}; speed: times the other side's.", ""]
    lines += ["| case | other side | exeunt | speed | bytes allow |", "|---|---|---|---|---|"]
    for b in results["benchmarks"]:
        info = b["extra_info"]
        (name, other), (_, ours) = info["sides"].items()
        allowed = f"{info['expected']:.2f}x" if info["expected"] else ""
        lines.append(f"| {info['case']} | {name} {other:.1f} | {ours:.1f} | {info['speed']:.2f}x | {allowed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what pytest --benchmark-json wrote")
    results = json.loads(parser.parse_args().file.read_text())
    print((pairs if "speed" in results["benchmarks"][0]["extra_info"] else table)(results))
