"""The coloured text: every token on the colour of the depth at which it left, in a terminal, as HTML and as PNG."""

from __future__ import annotations

import io
import textwrap
import warnings
from itertools import groupby
from typing import Any

from exeunt.demo import Answer, Outcome
from exeunt.verdict import table, verdict

__all__ = ["colour", "html", "png", "show", "tagged", "wrap"]

INK = "#1b1b1b"
EARLY, LATE, FULL = (255, 112, 67), (255, 213, 79), (226, 228, 232)  # warm where early, grey at full depth

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>exeunt demo</title></head>
<body style="margin: 2em; color: {foreground}; background: {background}">
<pre style="font: 15px/1.45 Menlo, 'DejaVu Sans Mono', Consolas, monospace">{code}</pre>
</body>
</html>
"""


def colour(depth: int, layers: int) -> str:
    """Background of a token for which ``depth`` of ``layers`` layers ran.

    Examples
    --------
    >>> from exeunt import picture
    >>> picture.colour(1, 30), picture.colour(30, 30)
    ('#ff7043', '#e2e4e8')
    """
    part = (depth - 1) / max(layers - 2, 1)
    mixed = [round(a + (b - a) * part) for a, b in zip(EARLY, LATE, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*(FULL if depth >= layers else mixed))


def legend(outcome: Outcome) -> list[tuple[int, str]]:
    """Layers that can have run for a token, and what to call that."""
    found, layers = outcome.depths, outcome.layers
    depths = [e + 1 for e in outcome.recipe.exits or ()] + [layers]
    names = [f"left after {d} of {layers} layers" if d < layers else f"all {layers} layers" for d in depths]
    return [(d, f"{name}: {found.count(d)} of {len(found)} tokens") for d, name in zip(depths, names, strict=True)]


def show(outcome: Outcome, title: str, console: Any) -> None:
    """Print everything on a rich console; where it has no colours, «guillemets» mark what left early.

    Examples
    --------
    >>> import io
    >>> from rich.console import Console
    >>> from exeunt import costs, demo, picture, recipes
    >>> from exeunt.models import discover
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> structure = discover(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)))
    >>> answer, side = demo.Answer("Hi", ["Good", " day"], [4, 2], [True] * 2, 2), demo.Side(2, 0.1, 2, [20.0])
    >>> outcome = demo.Outcome(recipes.calm([1]), structure, 1, side, side, costs.Costs(0.02, 0.02, 0.03), [answer])
    >>> console = Console(file=io.StringIO(), color_system=None)
    >>> picture.show(outcome, "Early exits", console)
    >>> console.file.getvalue().splitlines()[:4]
    ['Early exits', '', '> Hi', 'Good« day»']
    """
    from rich.table import Table
    from rich.text import Text

    plain = console.color_system is None or console.no_color
    console.print(Text(title, "bold"))
    for answer in outcome.answers:
        console.print(Text(f"\n> {answer.prompt}", "italic"))
        console.print(_text(answer, outcome.layers, plain))
    console.print()
    for depth, name in legend(outcome):
        mark = " «…» " if plain and depth < outcome.layers else "     "
        console.print(Text.assemble((mark, f"{INK} on {colour(depth, outcome.layers)}"), " ", name))
    grid = Table("", "full depth", "with exits", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in grid.columns[1:]:
        column.justify = "right"
    for row in table(outcome):
        grid.add_row(*row)
    console.print("", grid, "", sep="\n")
    for sentence in verdict(outcome):
        console.print(Text(sentence))


def html(outcome: Outcome, title: str) -> str:
    """The same as an HTML page.

    Examples
    --------
    >>> from exeunt import costs, demo, picture, recipes
    >>> from exeunt.models import discover
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> structure = discover(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)))
    >>> answer, side = demo.Answer("Hi", ["Good", " day"], [4, 2], [True] * 2, 2), demo.Side(2, 0.1, 2, [20.0])
    >>> outcome = demo.Outcome(recipes.calm([1]), structure, 1, side, side, costs.Costs(0.02, 0.02, 0.03), [answer])
    >>> "left after 2 of 4 layers: 1 of 2 tokens" in picture.html(outcome, "Early exits")
    True
    """
    console = _recording()
    show(outcome, title, console)
    return console.export_html(code_format=PAGE, inline_styles=True)


def _recording() -> Any:
    """A console for a page of HTML, coloured whatever stdout is."""
    from rich.console import Console

    options: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "no_color": False}
    return Console(record=True, width=100, file=io.StringIO(), **options)


def tagged(texts: list[str], spans: list[list[tuple[int, int, int]]], layers: int, title: str) -> str:
    """A page of HTML with texts a tagger has read, each word on the colour of its depth.

    Parameters
    ----------
    texts : list of str
    spans : list of list of (int, int, int)
        For each text: where a token of a word starts and ends, and how many layers ran for it.
    layers : int
        Of the model.
    title : str

    Examples
    --------
    >>> from exeunt import picture
    >>> page = picture.tagged(["Ann sings"], [[(0, 3, 6), (4, 9, 2)]], 6, "A tagger")
    >>> "left after 2 of 6 layers: 1 of 2 tokens" in page, picture.colour(2, 6) in page
    (True, True)
    """
    from rich.text import Text

    console = _recording()
    console.print(Text(title, "bold"))
    for text, own in zip(texts, spans, strict=True):
        line = Text(text)
        for start, end, depth in own:
            line.stylize(f"{INK} on {colour(depth, layers)}", start, end)
        console.print("", line, sep="\n")
    found = [depth for own in spans for _, _, depth in own]
    console.print()
    for depth in sorted(set(found)):
        name = f"left after {depth} of {layers} layers" if depth < layers else f"all {layers} layers"
        count = f"{found.count(depth)} of {len(found)} tokens"
        console.print(Text.assemble(("     ", f"{INK} on {colour(depth, layers)}"), f" {name}: {count}"))
    return console.export_html(code_format=PAGE, inline_styles=True)


def png(outcome: Outcome, title: str, columns: int = 100) -> bytes:
    """The same as a PNG image, drawn in the cells of a monospaced font.

    Examples
    --------
    >>> from exeunt import costs, demo, picture, recipes
    >>> from exeunt.models import discover
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> structure = discover(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)))
    >>> answer, side = demo.Answer("Hi", ["Good", " day"], [4, 2], [True] * 2, 2), demo.Side(2, 0.1, 2, [20.0])
    >>> outcome = demo.Outcome(recipes.calm([1]), structure, 1, side, side, costs.Costs(0.02, 0.02, 0.03), [answer])
    >>> picture.png(outcome, "Early exits")[1:4]
    b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from rich.cells import cell_len

    layers = outcome.layers
    lines: list[list[tuple[str, str | None]]] = [[(title, "bold")]]
    for answer in outcome.answers:
        lines.append([])
        lines += [[(line, "italic")] for line in textwrap.wrap(f"> {answer.prompt}", columns)]
        lines += [[(piece, colour(depth, layers)) for piece, depth in line] for line in wrap(answer, columns)]
    lines.append([])
    lines += [[("     ", colour(depth, layers)), (f" {name}", None)] for depth, name in legend(outcome)]
    lines += [[], [(f"{'':<48}{'full depth':>12}{'with exits':>12}", "bold")]]
    lines += [[(f"{name:<48}{full:>12}{early:>12}", None)] for name, full, early in table(outcome)]
    lines.append([])
    lines += [[(line, None)] for sentence in verdict(outcome) for line in textwrap.wrap(sentence, columns)]

    size = 11  # points; a cell is 0.602 of that wide and 1.5 high
    width, height = columns + 4, len(lines) + 2
    figure = Figure((width * 0.602 * size / 72, height * 1.5 * size / 72), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    font: dict[str, Any] = {
        "family": ["DejaVu Sans Mono", "DejaVu Sans"],
        "size": size,
        "color": INK,
        "va": "center_baseline",
    }
    for y, line in enumerate(lines, 1):
        x = 2
        for piece, look in line:
            style: dict[str, Any] = {"bold": {"weight": "bold"}, "italic": {"style": "italic"}}.get(look or "", {})
            if look and not style:
                axes.add_patch(Rectangle((x + 0.04, y + 0.06), cell_len(piece) - 0.08, 0.88, color=look, linewidth=0))
            axes.text(x, y + 0.5, piece, parse_math=False, **font, **style)
            x += cell_len(piece)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks become boxes
        canvas.print_png(file)
    return file.getvalue()


def wrap(answer: Answer, columns: int) -> list[list[tuple[str, int]]]:
    """Lines of (text, layers run) that are at most ``columns`` cells wide, broken between tokens where possible.

    Examples
    --------
    >>> from exeunt import demo, picture
    >>> answer = demo.Answer("Hi", ["Good", " day", "!"], [30, 25, 30], [True] * 3, 3)
    >>> picture.wrap(answer, 6)
    [[('Good', 30)], [('day', 25), ('!', 30)]]
    """
    from rich.cells import cell_len, chop_cells

    lines: list[list[tuple[str, int]]] = [[]]
    room = columns
    for piece, depth in zip(answer.pieces, answer.depths, strict=True):
        for k, part in enumerate(_visible(piece).split("\n")):
            if k:
                lines.append([])
                room = columns
            if cell_len(part) > room and lines[-1]:
                lines.append([])
                room, part = columns, part.lstrip(" ")
            for j, chunk in enumerate(chop_cells(part, columns) if part else []):
                if j:
                    lines.append([])
                    room = columns
                lines[-1].append((chunk, depth))
                room -= cell_len(chunk)
    return lines


def _visible(piece: str) -> str:
    """A token's text with line ends shown, and without what would move a terminal's cursor."""
    piece = piece.replace("\t", "    ").replace("\n", "↵\n")
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in piece)


def _text(answer: Answer, layers: int, plain: bool) -> Any:
    from rich.text import Text

    text = Text()
    tokens = zip(map(_visible, answer.pieces), answer.depths, strict=True)
    for early, run in groupby(tokens, lambda token: token[1] < layers):
        if plain and early:
            marked = "".join(piece for piece, _ in run)
            body = marked.rstrip("\n")
            text.append(f"«{body}»{marked[len(body) :]}")
        else:
            for piece, depth in run:
                text.append(piece, f"{INK} on {colour(depth, layers)}")
    return text
