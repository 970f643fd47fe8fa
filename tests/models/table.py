"""Turn the result files of tests/run_matrix into docs/models.md."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

#: What a test of tests/models/test_families.py shows of a family, in the words of the table.
CLAIMS = {
    "test_bit_identical_while_nothing_leaves": "identical",
    "test_bit_identical_under_other_ways_to_generate": "ways",
    "test_propagate_equals_the_oracle_that_runs_everything": "oracle",
    "test_defer_gives_the_keys_and_values_of_full_depth": "defer",
}

TEXT = """# Stock models

Written by `tests/run_matrix` from a run of `tests/models/test_families.py` on tiny random models; do not edit by hand.

`attach` finds the parts of a model by running a few tokens through it, and checks what it found: the head gives the
model's own logits bit for bit (or scaled, bounded or shifted in a way it has identified), and each decoder layer run
for one row gives what the whole batch gives that row, keys and values included. A model that is not listed works if
it passes these checks; if it does not, `attach` says in one sentence which part was missing.

Run on transformers {versions}; versions before 4.57 and from 6 on are refused. **yes** says that on this version
- with a threshold that never fires, logits and tokens of `generate` are those of the model alone, bit for bit: greedy,
  with beams, sampled, with eager attention, and in bfloat16;
- tokens that leave (CALM's state propagation, eager and lazy) give the tokens, depths and logits of an oracle that
  runs every layer for every row (float32), and the rows executed in each layer are those that the depths say;
- with `states.Defer`, tokens that leave and run deep later give the tokens, depths and logits of full depth, and of the
  exits on top of it.

{table}

## What an option of `generate` loses

| option | with exits |
|---|---|
| greedy, sampling, beams, beam-sample, `num_return_sequences` | works |
| `logits_processor`, `stopping_criteria`, `streamer`, `bad_words_ids`, `inputs_embeds` | works |
| `output_scores`, `output_logits` | works; of a row that left, the logits of its exit |
| `output_hidden_states` | works; a row that left stands still from its exit on |
| eager, sdpa and exeunt attention; bfloat16, float16 | works; any other attention is refused at attach |
| `output_attentions`, in a loop of your own too | full depth, with a warning |
| prompt lookup, assisted decoding, contrastive search, DoLa | full depth, with a warning |
| `assistant_early_exit` | refused as `generate` starts |
| `prefill_chunk_size`, a cache that goes on | works; the prompt runs at full depth, its last token too |
| `use_cache=False` | full depth, with a warning |
| `cache_implementation` static, quantized, offloaded; `past_key_values` of such a kind | refused before anything runs |
| `cache_implementation="dynamic"`, sliding windows | works; tokens that have left the window stay in memory |
| automatic compilation | off while attached: exits depend on data |
| PEFT adapters in the layers | works; on the output embedding, measures that read the head are refused |
| PEFT's `adapter_names`, other adapters for each row | full depth, with a warning |
| accelerate's offloading of layers | works; of the output embedding, measures that read the head are refused |
| `copy.deepcopy`, `pickle`, `torch.save`, `save_pretrained` | the copy is a stock model without exits |
| training mode, gradients through a decoding step | refused |
"""


def results(path: str) -> dict[str, dict[str, bool]]:
    """By family, which claims hold."""
    found: dict[str, dict[str, bool]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.*)\]", case.get("name", ""))
        if match is None or match[1] not in CLAIMS or "test_families" not in case.get("classname", ""):
            continue
        if case.find("skipped") is not None:
            continue
        family = match[2].split("-")[0]
        good = case.find("failure") is None and case.find("error") is None
        claims = found.setdefault(family, {})
        claims[CLAIMS[match[1]]] = claims.get(CLAIMS[match[1]], True) and good
    return found


def main(paths: list[str]) -> None:
    """Print docs/models.md."""
    runs = {Path(p).stem: results(p) for p in paths}
    versions = sorted(runs, key=lambda v: [int(p) if p.isdigit() else 99 for p in v.split(".")])
    families = list(dict.fromkeys(family for v in reversed(versions) for family in runs[v]))
    lines = ["| family | " + " | ".join(versions) + " |", "|---" * (len(versions) + 1) + "|"]
    for family in families:
        cells = []
        for version in versions:
            claims = runs[version].get(family)
            missing = [name for name in CLAIMS.values() if claims is not None and not claims.get(name)]
            cells.append("not there" if claims is None else "not: " + ", ".join(missing) if missing else "yes")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    print(TEXT.format(versions=", ".join(versions), table="\n".join(lines)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
