"""Turn the JSON of a benchmark run into the Markdown table that README and docs quote.

`python benchmarks/table.py FILE` prints medians in milliseconds and each peer's time as a multiple of exeunt's.
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="what pytest --benchmark-json wrote")
    print(table(json.loads(parser.parse_args().file.read_text())))
