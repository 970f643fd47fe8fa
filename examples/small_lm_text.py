"""The text that examples/train_small_lm.py reads, out of Debian packages that need not be installed:

    apt-get download python3.11-doc r-cran-janeaustenr wordnet-base
    for package in *.deb; do dpkg-deb -x "$package" text; done

Python's documentation (PSF-2.0), Jane Austen's six novels (public domain), and WordNet's definitions of verbs,
adjectives and adverbs (WordNet licence, permissive); those of nouns alone would be a third of the text.
"""

import bz2
import lzma
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

SOURCES = {
    "documentation": "usr/share/doc/python3.11/html/_sources",
    "novels": "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "definitions": "usr/share/wordnet",
}
LICENCES = "Python documentation (PSF-2.0), Jane Austen's novels (public domain), WordNet definitions (WordNet licence)"


def documents(root: Path) -> dict[str, list[str]]:
    """The documents of each source below the folder into which the packages were unpacked."""
    for place in SOURCES.values():
        if not (root / place).exists():
            raise FileNotFoundError(f"expected {place} below {root}: {Path(__file__).name} says what to unpack")
    found = {"documentation": documentation, "novels": novels, "definitions": definitions}
    return {name: list(read(root / SOURCES[name])) for name, read in found.items()}


def documentation(folder: Path) -> Iterator[str]:
    """Every page but the change log and the indices."""
    for page in sorted(folder.rglob("*.rst.txt")):
        text = page.read_text(encoding="utf-8")
        if page.name != "changelog.rst.txt" and len(text) > 500:
            yield text


def novels(database: Path) -> Iterator[str]:
    """Every chapter."""
    for lines in string_vectors(database.read_bytes()):
        if len(lines) > 1000:
            yield from re.split(r"\n(?=(?:CHAPTER|Chapter) )", unwrapped(lines))


def unwrapped(lines: list[str]) -> str:
    """Text with a line for each paragraph."""
    paragraphs = "\n".join(lines).split("\n\n")
    return "\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def definitions(folder: Path) -> Iterator[str]:
    """Definitions and example sentences, a hundred to a document."""
    entries = []
    for part in ("verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            synset, bar, gloss = line.partition(" | ")
            if bar and not line.startswith("  "):
                entries.append(f"{synset.split()[4].replace('_', ' ')}: {gloss.strip()}")
    for start in range(0, len(entries), 100):
        yield "\n".join(entries[start : start + 100])


def string_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors in an R lazy-load database: records of a length, a compression and R's serialisation."""
    at = 0
    while at < len(database):
        kind = database[at + 4 : at + 5]
        body = database[at + 4 :] if kind == b"x" else database[at + 5 :]
        unpack = {b"x": zlib.decompressobj, b"2": bz2.BZ2Decompressor, b"Z": lzma.LZMADecompressor}[kind]()
        record = unpack.decompress(body)
        at = len(database) - len(unpack.unused_data)
        start = record.find(struct.pack(">i", 16))  # a character vector; its length and its strings follow
        if start < 0:
            continue
        (count,) = struct.unpack_from(">i", record, start + 4)
        cursor, strings = start + 8, []
        for _ in range(count):
            flags, size = struct.unpack_from(">ii", record, cursor)
            if flags & 0xFF != 9:
                break
            cursor += 8
            strings.append(record[cursor : cursor + max(size, 0)].decode("utf-8", "replace"))
            cursor += max(size, 0)
        yield strings
