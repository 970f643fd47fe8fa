"""The demo's measuring function, costs, verdict and pictures on a tiny random model."""

from __future__ import annotations

import io
import math
from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the demo runs transformers models")
pytest.importorskip("rich", reason="the demo prints with rich")
from rich.cells import cell_len
from rich.console import Console

import exeunt
from exeunt import demo, picture, recipes
from exeunt.costs import Clock, Costs, check_seconds
from exeunt.heads import ExitHead, ExitHeads, Probe, Translator
from exeunt.models import discover
from exeunt.verdict import table, verdict

PLAIN = partial(Console, color_system=None)  # whatever NO_COLOR and FORCE_COLOR say
COLOURS = partial(Console, force_terminal=True, color_system="truecolor", no_color=False)
LAYERS, WIDTH, VOCAB = 4, 32, 60
PROMPTS = ["abc", "a longer one", "xy", "why not?", "zzzz"]


class Letters:
    """A tokenizer whose tokens are characters; pads on the left."""

    def apply_chat_template(self, chats, **options):
        assert options["add_generation_prompt"] and options["padding"]
        rows = [[2 + ord(c) % (VOCAB - 2) for message in chat for c in message["content"]] for chat in chats]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def decode(self, ids):
        return "".join(chr(ord("A") + i) for i in ids)


def encode(prompts):
    return Letters().apply_chat_template(
        [[{"content": prompt}] for prompt in prompts], add_generation_prompt=True, padding=True
    )


def random_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.25, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def random_heads():
    torch.manual_seed(1)
    probe = Probe(WIDTH)
    torch.nn.init.normal_(probe.weight)
    return ExitHeads({1: ExitHead(Translator(WIDTH), probe)})


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def heads():
    return random_heads()


@pytest.fixture(scope="module")
def recipe(heads):
    return recipes.calm(heads=heads, threshold=0.5, confidence="probe")


@pytest.fixture
def ending(model):
    """The model with a token that ends some rows of its generation early."""
    inputs = encode(PROMPTS)
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = int(new[1, 4])
    yield model
    model.generation_config.eos_token_id = None


def side(*speeds):
    """Batches of 3 tokens at these speeds."""
    tokens, seconds = 3 * len(speeds), sum(3 / speed for speed in speeds)
    return demo.Side(tokens, seconds, tokens, list(speeds))


def synthetic(model, recipe, **changed):
    answer = demo.Answer("Say.", ["One", " two\n", " three"], [LAYERS, 2, 2], [True, True, False], 2)
    parts = {
        "recipe": recipe, "structure": discover(model), "batch": 1, "full": side(3),
        "early": side(6), "costs": Costs(0.05, 0.1, 0.01), "answers": [answer],
    }  # fmt: skip
    return demo.Outcome(**parts | changed)


@pytest.mark.parametrize("confidence", ["margin", "probe"])
def test_threshold_that_never_fires_gives_the_full_depth_text(model, heads, confidence):
    never = recipes.calm(heads=heads, threshold=math.inf, confidence=confidence)
    out = demo.measure(model, Letters(), never, PROMPTS, tokens=8)
    assert out.agreement() == 1.0 and math.isnan(out.agreement(among_left=True)) and out.left == 0
    assert all(answer.same_start == len(answer.pieces) == 8 for answer in out.answers)
    assert set(out.depths) == {LAYERS}
    assert out.full.tokens == out.early.tokens == out.full.head_reads == 8 * len(PROMPTS)
    checks = 7 * len(PROMPTS) if confidence == "margin" else 0  # the first token comes from the prompt's forward
    assert out.early.head_reads == out.full.head_reads + checks


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_depths_and_tokens_are_those_of_the_report(ending, recipe, batch):
    out = demo.measure(ending, Letters(), recipe, PROMPTS, tokens=12, batch=batch)
    answers, reads = iter(out.answers), 0
    for i in range(0, len(PROMPTS), batch):
        group = PROMPTS[i : i + batch]
        inputs = encode(group)
        with exeunt.attach(ending, recipe) as early:
            ids = ending.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            report = early.report()
        reads += report.head_reads + 1
        for row, prompt in enumerate(group):
            answer = next(answers)
            said = ids[row].tolist()
            if ending.generation_config.eos_token_id in said:
                said = said[: said.index(ending.generation_config.eos_token_id) + 1]
            assert answer.prompt == prompt
            assert "".join(answer.pieces) == Letters().decode(said)
            left_after = [int(step[row]) for step in report.exit_layers[: len(said) - 1]]
            assert answer.depths == [LAYERS, *(layer + 1 for layer in left_after)]
    assert out.early.tokens == len(out.depths) < 12 * len(PROMPTS), "no row ended early: the test lost its point"
    assert out.early.head_reads == reads
    assert set(out.depths) == {2, LAYERS}, "want both kinds of tokens"


@pytest.mark.parametrize("batch", [1, 5])
def test_agreement_is_what_the_model_chooses_after_each_prefix(model, recipe, batch):
    out = demo.measure(model, Letters(), recipe, PROMPTS, tokens=12, batch=batch)
    everything = []
    for answer in out.answers:
        ids = encode([answer.prompt])["input_ids"]
        stock = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        said, expected = [ord(piece) - ord("A") for piece in answer.pieces], []
        for token in said:
            with torch.no_grad():
                expected.append(int(model(ids).logits[0, -1].argmax()) == token)
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
        assert answer.agrees == expected
        differing = [k for k in range(12) if said[k] != stock[k]]
        assert answer.same_start == (differing[0] if differing else 12)
        everything += expected
    assert 0 < out.agreement() == sum(everything) / len(everything) < 1


def test_progress_and_model_left_as_it_was(model, recipe):
    rows, hooks = [], [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    demo.measure(model, Letters(), recipe, PROMPTS, tokens=3, batch=2, advance=rows.append)
    assert sum(rows) == 2 * len(PROMPTS)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert "forward" not in vars(model.model.layers[0])


def test_one_token_runs_without_a_decoding_step(model, recipe):
    out = demo.measure(model, Letters(), recipe, ["ab"], tokens=1)
    assert out.depths == [LAYERS] and math.isnan(out.costs.layer)
    assert "no token could leave" in " ".join(verdict(out)) and table(out)


def test_pieces_of_a_character_of_several_tokens():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = "é €!"
    pieces = demo._pieces(Bytes(), list(text.encode()))
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    assert pieces == ["", "é", " ", "", "", "€", "!"]
    assert demo._pieces(Bytes(), list("€".encode()[:2])) == ["", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("confidence", ["margin", "probe", "saturation"])
def test_costs(model, heads, confidence):
    clock = Clock(discover(model))
    with clock:
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert (len(clock._layers), len(clock._head)) == (3, 4)  # of the prompt the last position's head alone
    costs = clock.costs(recipes.calm(heads=heads, confidence=confidence, threshold=0.5), rows=2)
    assert all(seconds > 0 for seconds in costs)
    clock.clear()
    assert not clock._layers and check_seconds(discover(model), recipes.calm(exits=[0], threshold=0.5), 1, 2) > 0


def test_table_and_verdict_follow_from_the_numbers(model, heads, recipe):
    out = synthetic(model, recipe)
    cells = {name: (full, early) for name, full, early in table(out)}
    assert cells["tokens per second, mean of the prompts"] == ("3.0", "6.0")
    assert cells["layers run per token"] == ("4.0", "2.7")
    assert cells["tokens that left early"][1] == "67%"
    assert cells["next-token agreement on the early-exit text"][1] == "66.7%"
    assert cells["the same for tokens that left early"][1] == "50.0%"
    assert cells["first tokens equal to the full-depth text"][1] == "2 of 3"

    weights = sum(p.numel() for p in model.model.layers[0].parameters())
    said = " ".join(verdict(out))
    assert "faster (+100.0%): 67% of the tokens left before the last layer, and 67% of all are" in said
    assert f"{VOCAB * WIDTH / weights:.1f} layers in bytes" in said
    assert "2.0 in time" in said and "an exit after 2 of 4 layers saves 2." in said
    assert "reads no head and costs 0.20 layers" in said and "more than 10" in said  # 0.2 of 2
    assert "worth +23.3%" in said  # 4/3 layers less and one check more of a step of 0.3 s
    assert "the gain would be 50%" in said  # two layers less

    reading = " ".join(verdict(synthetic(model, recipes.calm(heads=heads, threshold=0.5, confidence="margin"))))
    assert "more than 5.0%" in reading  # 0.01 s of two layers and the head, 0.2 s
    assert "the gain would be 173%" in reading  # two layers and the head less, a check more
    assert "worth +69.8%" in reading  # two of three tokens do not read the head again
    faster, slower, unclear, outlier, same = (
        verdict(synthetic(model, recipe, full=side(*[4] * len(speeds)), early=side(*speeds)))[0]
        for speeds in ([5, 6], [3], [3.8, 8.2], [4.1, 4.1, 4.2, 8], [4.1, 4.05])
    )
    assert faster.startswith("Early exit made this run faster (+37.5%; from prompt to prompt +25% to +50%):")
    assert slower.startswith("Early exit made this run slower (-25.0%):")
    assert unclear.startswith("This run shows no gain or loss in speed beyond noise (+50.0%; from prompt to prompt -5%")
    assert outlier.startswith("This run shows no gain or loss in speed beyond noise (+27.5%")
    assert same.startswith("This run shows no gain or loss in speed beyond noise (+1.9%; from prompt to prompt +1%")
    assert any("as long as one row stays" in sentence for sentence in verdict(synthetic(model, recipe, batch=2)))
    nothing = synthetic(model, recipe, answers=[demo.Answer("?", ["a"], [LAYERS], [True], 1)])
    assert not any("same for tokens" in name for name, *_ in table(nothing))


def test_colours_run_from_warm_to_grey():
    shades = [picture.colour(depth, 30) for depth in range(1, 31)]
    assert len(set(shades)) == 30 and shades[-1] == "#e2e4e8"
    assert picture.colour(1, 2) == picture.colour(1, 30)


def test_wrap_keeps_every_token_within_the_columns():
    pieces = ["The", " capital", " of", "\n\n", "    indented", " longest" * 4, "", " 日本語", "\tend"]
    answer = demo.Answer("?", pieces, list(range(len(pieces))), [True] * len(pieces), 0)
    lines = picture.wrap(answer, 12)
    joined = "".join(text for line in lines for text, _ in line)
    kept = "".join(pieces).replace("\t", "    ").replace("\n", "↵")
    assert joined.replace(" ", "") == kept.replace(" ", "")
    assert all(sum(cell_len(text) for text, _ in line) <= 12 for line in lines)
    assert lines[0] == [("The", 0), (" capital", 1)] and lines[1] == [("of", 2), ("↵", 3)] and lines[2] == [("↵", 3)]
    assert lines[3] == [("    indented", 4)]
    assert {depth for line in lines for _, depth in line} == {0, 1, 2, 3, 4, 5, 7, 8}


@pytest.mark.parametrize("columns", [80, 120])
def test_piped_text_has_no_colours_and_marks_what_left(model, recipe, columns):
    file = io.StringIO()
    picture.show(synthetic(model, recipe), "a title", PLAIN(file=file, width=columns))
    text = file.getvalue()
    assert "\x1b" not in text and "One« two↵\n three»" in text and "> Say." in text and "a title" in text
    assert "left after 2 of 4 layers: 2 of 3 tokens" in text and "all 4 layers: 1 of 3 tokens" in text
    assert max(map(len, text.splitlines())) <= columns


def test_terminal_has_every_token_on_its_colour(model, recipe):
    file = io.StringIO()
    picture.show(synthetic(model, recipe), "a title", COLOURS(file=file))
    full, early = (tuple(bytes.fromhex(picture.colour(d, LAYERS)[1:])) for d in (LAYERS, 2))
    assert "48;2;{};{};{}mOne".format(*full) in file.getvalue()
    assert "48;2;{};{};{}m two↵".format(*early) in file.getvalue()


def test_control_characters_do_not_reach_the_terminal(model, recipe):
    answer = demo.Answer("?", ["a\x1b[2J", "\rb"], [2, LAYERS], [True, True], 2)
    file = io.StringIO()
    picture.show(synthetic(model, recipe, answers=[answer]), "t", PLAIN(file=file, width=80))
    assert "«a·[2J»·b" in file.getvalue()


def test_html_and_png_show_the_tokens(model, recipe):
    matplotlib = pytest.importorskip("matplotlib.image", reason="the PNG is drawn with matplotlib")
    pytest.importorskip("PIL", reason="comes with matplotlib")
    out = synthetic(model, recipe)
    page = picture.html(out, "a <title>")
    assert page.startswith("<!DOCTYPE html>") and "a &lt;title&gt;" in page and "three" in page
    assert picture.colour(2, LAYERS) in page and picture.colour(LAYERS, LAYERS) in page
    image = matplotlib.imread(io.BytesIO(picture.png(out, "a title")))
    assert image.shape[0] > 300 and image.shape[1] > 1000
    found = {tuple(c) for c in (image[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert all(tuple(bytes.fromhex(picture.colour(d, LAYERS)[1:])) in found for d in (2, LAYERS))
