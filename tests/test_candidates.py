"""SpecEE: candidates, the probe that reads them, the head that confirms."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="attach needs transformers")
from transformers import LlamaConfig, LlamaForCausalLM

import exeunt
from exeunt import small_lm
from exeunt.candidates import features
from exeunt.confidence import candidate_probe
from exeunt.evaluation import record_tokens
from exeunt.heads import CandidateProbe, ExitHead, ExitHeads
from exeunt.models import discover
from exeunt.recipes import Recipe, specee
from exeunt.replay import replay
from exeunt.states import Defer, Drop
from exeunt.training import train_candidate_probes
from exeunt.training.candidates import examples

EXITS, PROMPT, NEW = (1, 2, 4), 5, 14


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(1)
    found = {e: ExitHead(candidates=CandidateProbe(4, 16)) for e in EXITS}
    for own in found.values():
        torch.nn.init.normal_(own.candidates.out.weight, std=0.5)
    return ExitHeads(found).requires_grad_(False)


def generate(model, recipe, rows):
    ids = torch.randint(3, 119, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
    with exeunt.attach(model, recipe) as early:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return out, early.report()


def test_features_as_computed_by_hand():
    logits, shown = torch.tensor([[0.0, 0.0], [200.0, 0.0]]), torch.tensor([[0.5, 0.5], [torch.nan, torch.nan]])
    assert features(logits, shown).tolist() == [[0, 0, 0.5, 0.5, 0, 0], [200, 0, 1, 0, 0, 0]]


def test_candidate_logits_are_the_models_own(model):
    structure = discover(model)
    state = torch.randn(35, 32)
    ids = torch.randint(120, (35, 4))
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(state)).gather(1, ids)
        assert torch.allclose(structure.candidate_logits(state, ids), expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_leave_where_probe_and_head_say_so(model, heads, rows):
    """Keys and values are exact with Defer, so that a recording of the very text decides as the run did."""
    recipe = specee(heads=heads, threshold=0.5, state=Defer())
    out, report = generate(model, recipe, rows)
    recording = record_tokens(model, out, EXITS, heads=heads, prompt=PROMPT, progress=False)
    told = replay(recording, recipe).depth.view(rows, -1)
    live = torch.stack(report.exit_layers, 1)
    assert torch.equal(live, told) and len(live.unique()) > 1
    scores = recording.measures["candidate_probe"]
    assert scores[:, :-1].isnan().any() and scores[:, :-1].isfinite().any()  # some were not confirmed
    said = recording.predicted.view(rows, -1, len(EXITS) + 1)
    at = torch.tensor([*EXITS, 5])
    column = (live[..., None] == at).int().argmax(-1)
    assert torch.equal(said.gather(2, column[..., None])[..., 0], out[:, PROMPT + 1 :])


def test_a_check_reads_no_vocabulary(model, heads):
    steps = NEW - 1
    never, report = generate(model, specee(heads=heads, threshold=1.0), 2)
    assert report.head_reads == 2 * steps  # the draft, and the model's own at the end
    own, report = generate(model, specee(heads=heads, threshold=1.0, draft=lambda h: torch.zeros(len(h), 4).long()), 2)
    assert report.head_reads == steps
    stock, _ = generate(model, exeunt.recipes.calm([1], float("inf")), 2)
    assert torch.equal(never, stock) and torch.equal(own, stock)


def test_what_is_not_among_the_candidates_does_not_leave(model, heads):
    sure = ExitHeads({e: ExitHead(candidates=CandidateProbe(4, 16)) for e in EXITS}).requires_grad_(False)
    for e in EXITS:
        sure[e].candidates.out.weight.zero_()
        sure[e].candidates.out.bias.fill_(9.0)
    _, report = generate(model, specee(heads=sure, draft=lambda h: torch.full((len(h), 4), 7)), 2)
    assert report.histogram.get(5, 0) > 20  # word 7 is seldom the answer, and the probe always says yes
    _, report = generate(model, specee(heads=sure), 2)
    assert report.histogram.keys() == {1}  # by their own exit, which confirms itself


def test_saved_and_read_again(tmp_path, model, heads):
    heads.save(tmp_path / "exits.safetensors", model.config)
    again = ExitHeads.load(tmp_path / "exits.safetensors", model.config)
    seen = torch.randn(3, 12)
    assert torch.equal(again[2].candidates(seen), heads[2].candidates(seen))
    assert again.half()[2].candidates.hidden.weight.dtype == torch.float32


def test_a_trained_probe_knows_which_exits_are_right(tmp_path):
    """The small LM on text of this repository: rows that were not trained on."""
    model, tokenizer = small_lm.load()
    text = (exeunt.replay.__doc__ or "") + "".join(str(f.__doc__) for f in vars(exeunt.recipes).values())
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // 96 * 96].view(-1, 96)
    train, held_out = rows[::2], rows[1::2]
    heads = train_candidate_probes(model, train, (5, 7), tmp_path / "run", width=32, steps=200, progress=False)
    seen, right = examples(model, held_out, [5, 7], None, 4, 8, False)
    for k, e in enumerate((5, 7)):
        score, yes = heads[e].candidates(seen[:, k]), right[:, k] > 0.5
        above = (score[yes][:, None] > score[~yes]).double().mean()
        assert above > 0.75  # chance: 0.5


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda h: specee([1]), r"needs exit heads with a probe of 4 candidates at \[1\]"),
        (lambda h: specee(heads=h, count=3), r"needs exit heads with a probe of 3 candidates at \[1, 2, 4\]"),
        (lambda h: specee(heads=h, count=1), "count must lie in 2..8, got 1"),
        (lambda h: specee(), "give exits, or heads that have them, got neither"),
    ],
)
def test_bad_input_gets_one_sentence(heads, call, message):
    with pytest.raises(ValueError, match=message):
        call(heads)


def test_a_draft_is_checked(model, heads):
    with pytest.raises(ValueError, match=r"draft must give ids in 0..119, got 120..120"):
        generate(model, specee(heads=heads, draft=lambda h: torch.full((len(h), 4), 120)), 1)
    with pytest.raises(ValueError, match=r"draft must give int64 ids \[1, 4\], got torch.int64 \[1, 3\]"):
        generate(model, specee(heads=heads, draft=lambda h: torch.zeros(len(h), 3).long()), 1)


def test_classifiers_have_no_vocabulary():
    from encoder_zoo import CLASSES, build
    from exeunt.classifier_heads import ClassifierHeads, LinearHead
    from exeunt.policies import Threshold

    heads = ClassifierHeads({1: LinearHead(32, CLASSES)})
    heads[1].candidates = CandidateProbe()
    with pytest.raises(ValueError, match="names words of a vocabulary: expected a language model"):
        exeunt.attach(build("bert"), Recipe((1,), candidate_probe(), Threshold(0.5), Drop(), heads))
