"""Write the part of docs/systems.md that says what the docstrings of the recipes say.

python docs/make_systems.py [--check]
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from pathlib import Path

from exeunt import recipes
from exeunt.heads import CandidateProbe, ExitHead, ExitHeads
from exeunt.policies import FirstOf

PAGE = Path(__file__).with_name("systems.md")
BEGIN, END = "<!-- python docs/make_systems.py -->\n", "<!-- end -->\n"

PROBES = ExitHeads({4: ExitHead(candidates=CandidateProbe())})
# What recipes without defaults for everything are made with, to be looked at.
MADE_WITH = {
    "calm": {"exits": [4]},
    "free": {"exit": 4},
    "specee": {"heads": PROBES},
    "skipdecode": {"deepest": 8, "shallowest": 4},
}


def parts(function) -> tuple[str, str, str]:
    """Title, rule and notes out of a recipe's docstring."""
    doc = inspect.getdoc(function)
    title, rest = doc.split("\n\n", 1)
    rule = rest.split("\n\nParameters\n")[0]
    notes = rest.split("Notes\n-----\n")[1].split("\n\nExamples\n")[0]
    return title.rstrip("."), rule, notes


def signature(function) -> str:
    """The rule's own parameters with their defaults."""
    own = [p for p in inspect.signature(function).parameters.values() if p.name not in ("exits", "heads")]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in own)


def page() -> str:
    """Markdown: a table of all recipes, and a section for each."""
    table = [
        "| recipe | system | measure | policy | skipped layers |",
        "|---|---|---|---|---|",
    ]
    sections = []
    for name in recipes.__all__:
        function = getattr(recipes, name)
        if not inspect.isfunction(function):
            continue
        title, rule, notes = parts(function)
        recipe = function(**MADE_WITH.get(name, {}))
        policies = recipe.policy.policies if isinstance(recipe.policy, FirstOf) else [recipe.policy]
        policy = " or ".join(f"`{type(p).__name__}`" for p in policies)
        measure = "none" if recipe.confidence is None else f"`{recipe.confidence.name}`"
        table.append(f"| `{name}` | {title} | {measure} | {policy} | `{type(recipe.state).__name__}` |")
        published, deviations = notes.split("**Deviations.**")
        said = (f"{title}. {rule}", published, f"**Deviations.** {deviations}")
        text = "\n\n".join(textwrap.fill(" ".join(s.replace("``", "`").split()), 118) for s in said)
        sections.append(f"### `{name}({signature(function)})`\n\n{text}\n")
    return "\n".join([*table, "", *sections])


def main(check: bool) -> int:
    """Write the page, or say whether it is what would be written."""
    before, old = PAGE.read_text().split(BEGIN)
    written = before + BEGIN + page() + END + old.split(END, 1)[1]
    if check:
        return 0 if written == PAGE.read_text() else "docs/systems.md is old: run python docs/make_systems.py"
    PAGE.write_text(written)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the page is not current")
    sys.exit(main(parser.parse_args().check))
