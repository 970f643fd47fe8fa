"""Recording states, training exits on them, and the command that does both."""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import exeunt
from exeunt import cli
from exeunt.calibration import fingerprints
from exeunt.heads import DecoderLayer, ExitHead, ExitHeads, Probe, Translator
from exeunt.models import discover
from exeunt.training import (
    HEADS_FILE,
    TRAINING_FILE,
    Joint,
    Objective,
    Recorded,
    Recording,
    history,
    loop,
    objectives,
    parse,
    record,
    recording,
    select,
    sketches,
    tokenised,
    train_exits,
)
from exeunt.training import exits as exits_module

EXITS = [0, 2]


def tiny(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def rows(count, length=12, seed=0):
    return np.random.default_rng(seed).integers(60, size=(count, length + 1))


def expected_states(model, ids):
    """By transformers' own account of its hidden states."""
    with torch.no_grad():
        out = model.model(input_ids=torch.from_numpy(ids[:, :-1]), output_hidden_states=True, use_cache=False)
    states = [out.hidden_states[e + 1] for e in EXITS] + [out.last_hidden_state]
    return torch.stack(states, 2).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recorded_states_are_the_models(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(recording, "CHUNK", 4)
    model, ids = tiny(dtype=dtype), rows(10)
    states = record(model, ids, EXITS, tmp_path, batch=4, progress=False)
    assert len(list(tmp_path.glob("states-*.npy"))) == 3 and len(states) == 120
    index = np.random.default_rng(1).permutation(120)
    got, labels = states.read(index)
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.05  # batches differ
    torch.testing.assert_close(got, expected_states(model, ids)[index], rtol=0, atol=tolerance)
    assert np.array_equal(labels, ids[:, 1:].ravel()[index])


def test_a_killed_recording_goes_on_behind_its_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "CHUNK", 2)
    model, ids = tiny(), rows(8)
    whole = record(model, ids, EXITS, tmp_path / "whole", progress=False).read(range(96))[0]
    plain, ran = recording._states, []

    def dies(*args):
        ran.append(1)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(recording, "_states", dies)
    with pytest.raises(KeyboardInterrupt):
        record(model, ids, EXITS, tmp_path / "killed", progress=False)
    states = record(model, ids, EXITS, tmp_path / "killed", progress=False)
    assert len(ran) == 5, "chunks that were there are not made again"
    assert torch.equal(states.read(range(96))[0], whole)


def test_states_of_another_model_or_text_are_refused(tmp_path):
    model, ids = tiny(), rows(3)
    record(model, ids, EXITS, tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds states of another model: expected"):
        record(tiny(seed=1), ids, EXITS, tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds states of other text: expected"):
        record(model, rows(3, seed=1), EXITS, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"holds states of other exits: expected \[1\], got \[0, 2\]$"):
        record(model, ids, [1], tmp_path, progress=False)
    both, one = (record(model, ids, exits, tmp_path, progress=False) for exits in (EXITS, [2]))
    assert one.exits == [2] and torch.equal(one.read([5, 3])[0], both.read([5, 3])[0][:, 1:])


@pytest.mark.parametrize("exits", [[3], [-1, 1], []])
def test_exits_out_of_range_are_refused(tmp_path, exits):
    sentence = rf"^exits must lie in 0\.\.2 for a model of 4 layers, got \{sorted(exits)}$".replace("\\[]", r"\[\]")
    with pytest.raises(ValueError, match=sentence):
        record(tiny(), rows(3), exits, tmp_path, progress=False)
    with pytest.raises(ValueError, match=sentence):
        Joint(tiny(), exits, parse("ce", [1, 3]))


def test_recorded_and_joint_see_the_same(tmp_path):
    """Two ways to the same loss: states from disk, and the model run again."""
    model, ids = tiny(), rows(4)
    heads = ExitHeads({0: ExitHead(Translator(32), Probe(32)), 2: ExitHead(probe=Probe(32), layer=DecoderLayer(32, 4))})
    for weight in (heads[0].translator.down.weight, heads[2].layer.down.weight, heads[2].layer.out.weight):
        torch.nn.init.normal_(weight, std=0.1)
    goal = parse("ce + 0.3*kl + 0.2*reverse-kl + probe + 0.1*layer", [*EXITS, 3])
    states, labels = record(model, ids, EXITS, tmp_path, progress=False).read(range(48))
    with torch.no_grad():
        recorded = Recorded(discover(model), heads, goal, length=12)((states, labels))
        joint = Joint(model, EXITS, goal, heads)(torch.from_numpy(ids))
    assert recorded.item() == pytest.approx(joint.item(), rel=1e-4)


@pytest.mark.parametrize(
    "which, trained",
    [
        ("heads", {"heads"}),
        ("last-1", {"heads", "model.layers.3", "model.norm", "lm_head"}),
        ("all", {"heads", "model", "lm_head"}),
    ],
)
def test_select(which, trained):
    joint = Joint(tiny(), EXITS, parse("ce", [*EXITS, 3]), ExitHeads({0: ExitHead(probe=Probe(32))}))
    select(joint, which)
    for name, parameter in joint.named_parameters():
        name = name.removeprefix("model.")
        assert parameter.requires_grad == name.startswith(tuple(trained)), name


@pytest.mark.parametrize("which", ["last-0", "last-5", "last", "none"])
def test_select_refuses(which):
    joint = Joint(tiny(), EXITS, parse("ce", [*EXITS, 3]))
    with pytest.raises(ValueError, match=rf"heads, last-K with K in 1\.\.4, or all, got '{which}'$"):
        select(joint, which)


def test_trained_translators_agree_more_than_none(tmp_path):
    model, text = tiny(), rows(80)
    kept = [p.clone() for p in model.parameters()]
    heads = train_exits(model, text, EXITS, "kl + probe", tmp_path / "out", held_out={"test": rows(10, seed=1)},
                        steps=150, batch=64, progress=False, about={"licence": "none"})  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True)), "the model stays as it is"
    none = record(model, rows(10, seed=1), EXITS, tmp_path / "none", progress=False)
    states, labels = none.read(range(len(none)))
    bare = Recorded(discover(model), ExitHeads({e: ExitHead() for e in EXITS}), parse("kl", [*EXITS, 3]))
    before = {e: agrees.float().mean().item() for e, agrees in bare.measured((states, labels))[1].items()}
    stored = ExitHeads.load(tmp_path / "out" / HEADS_FILE, model.config)
    figures = json.loads(stored.metadata["held_out"])["test"]
    for e in EXITS:
        assert figures[str(e)]["agreement"] > before[e]
        assert set(figures[str(e)]) == {"agreement", "perplexity", "margin", "probe"}
        assert stored[e].probe.weight.abs().sum() > 0
    assert figures["3"]["agreement"] == 1.0
    for name in ("model", "data", "objective", "steps", "seed", "licence"):
        assert stored.metadata[name]
    again = train_exits(model, text, EXITS, "kl + probe", tmp_path / "out", held_out={"test": rows(10, seed=1)},
                        steps=150, batch=64, progress=False)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="belongs to another run: expected objective kl \\+ probe, got kl$"):
        train_exits(model, text, EXITS, "kl", tmp_path / "out", held_out={"test": rows(10, seed=1)},
                    steps=150, batch=64, progress=False)  # fmt: skip


def test_exits_trained_on_parts_of_the_vocabulary_end_in_the_same_bits_however_often_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(exits_module, "fit", functools.partial(loop.fit, every=0.0))
    monkeypatch.setattr(objectives, "LIKELY", 1)  # so that of 60 tokens many are left to be drawn
    model, text = tiny(), rows(40)
    plain, reads = Recording.read, []

    def train(out):
        return train_exits(model, text, EXITS, "kl + probe", tmp_path / out, held_out={"test": rows(4, seed=1)},
                           sample=15, steps=20, batch=8, progress=False)  # fmt: skip

    def dies(self, index):
        reads.append(1)
        if len(reads) in (8, 12):
            raise KeyboardInterrupt
        return plain(self, index)

    whole = train("whole")
    monkeypatch.setattr(Recording, "read", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    again = train("stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert len(reads) == 20 + 2 + 1, "steps that were done are not done again"


def test_an_exit_with_a_decoder_layer_is_trained_on_whole_sequences_and_not_attached(tmp_path, monkeypatch):
    model, text = tiny(), rows(80)
    given = {"held_out": {"test": rows(10, seed=1)}, "steps": 150, "batch": 64, "progress": False}
    seen, plain = [], Recording.read
    monkeypatch.setattr(Recording, "read", lambda self, index: seen.append(np.asarray(index)) or plain(self, index))
    heads = train_exits(model, text, [2], "kl + probe", tmp_path, head="layer", sample=20, **given)
    assert all(len(index) % 12 == 0 and (index.reshape(-1, 12) % 12 == np.arange(12)).all() for index in seen)
    assert len(seen[0]) == 60, "as many sequences as fit into a batch"
    assert heads[2].translator is None and heads[2].layer.key_value_heads == 2
    figures = json.loads(heads.metadata["held_out"])["test"]
    untrained = train_exits(model, text, [2], "kl", tmp_path / "b", head="layer", **given | {"steps": 1})
    assert figures["2"]["agreement"] > json.loads(untrained.metadata["held_out"])["test"]["2"]["agreement"] + 0.05
    from exeunt.evaluation import record_tokens  # another way to the same: the model run on the held-out text

    recording = record_tokens(model, torch.from_numpy(rows(10, seed=1)), [2], heads=heads, prompt=1, progress=False)
    agree = (recording.predicted[:, 0] == recording.predicted[:, 1]).float().mean().item()
    assert agree == pytest.approx(figures["2"]["agreement"], abs=0.08)  # which has the first token of a row as well
    with pytest.raises(ValueError, match="read one token's state, got a decoder layer of its own at exit 2"):
        exeunt.attach(model, exeunt.recipes.calm(heads=heads, threshold=0.5))
    with pytest.raises(ValueError, match="^head must be translator or layer, got 'mlp'$"):
        train_exits(model, text, [2], "kl", tmp_path / "c", head="mlp", **given)


@pytest.mark.parametrize("which", ["last-1", "all"])
def test_a_model_trained_with_its_exits_learns(tmp_path, which):
    pattern = np.tile(np.arange(60), 60)[: 60 * 13].reshape(60, 13)  # what follows is certain
    model = tiny()
    train_exits(model, pattern, EXITS, "ce", tmp_path, held_out={"test": pattern[:10]}, which=which, steps=60,
                batch=96, learning_rate=0.01, progress=False)  # fmt: skip
    figures = json.loads(ExitHeads.load(tmp_path / HEADS_FILE, model.config).metadata["held_out"])["test"]
    assert figures["3"]["perplexity"] < 30 < 60
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters(), strict=True))


@pytest.mark.parametrize("rate", [0.0, -0.1, float("inf"), float("nan")])
def test_a_learning_rate_that_learns_nothing_is_refused(tmp_path, rate):
    with pytest.raises(ValueError, match="^learning_rate must be larger than 0 and finite, got "):
        train_exits(tiny(), rows(3), EXITS, "kl", tmp_path, held_out={"a": rows(1)}, learning_rate=rate)


def test_a_run_in_float32_is_not_gone_on_with_in_bfloat16(tmp_path):
    given = {"held_out": {"a": rows(4)}, "which": "all", "batch": 24, "progress": False}
    heads = train_exits(tiny(), rows(20), EXITS, "ce", tmp_path, steps=2, **given)
    assert heads.metadata["bf16"] == "False"
    with pytest.raises(ValueError, match="belongs to another run: expected bf16 False, got True$"):
        train_exits(tiny(), rows(20), EXITS, "ce", tmp_path, steps=20, bf16=True, **given)


def test_a_trained_model_says_on_what_and_on_what_it_was_trained_before(tmp_path):
    assert sketches(tiny()) == [] and history(tiny()) == {}
    model, sketched = tiny(), []
    for name in ("first", "second"):
        text = rows(20, length=100, seed=len(sketched))
        heads = train_exits(model, text, EXITS, "ce", tmp_path / name, held_out={"a": rows(4)}, which="last-1", steps=2,
                            batch=100, progress=False)  # fmt: skip
        model = LlamaForCausalLM.from_pretrained(tmp_path / name / "model")
        sketched.insert(0, fingerprints.sketch(text))
        assert sketches(model) == sketched and history(model)["objective"] == heads.metadata["objective"] == "ce"
    (tmp_path / "second" / "model" / TRAINING_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"training\.json must say in JSON what the model was trained on"):
        sketches(model)


def test_objectives_are_read_and_refused():
    goal = parse("ce:sum + 0.5*kl", [1, 3])
    assert goal.terms[0].weights == {1: 1.0, 3: 1.0} and goal.terms[1].weight == 0.5
    assert isinstance(goal, Objective)
    for text in ("", "mse", "-1*kl", "x*kl", "nan*kl", "kl:sum", "kl +"):
        with pytest.raises(ValueError, match="objective terms must be ce, kl, reverse-kl, probe, layer"):
            parse(text, [1, 3])
    with pytest.raises(ValueError, match="'sum', 'depth' or 'final', got 'x'"):
        parse("ce:x", [1, 3])


def test_too_little_text_is_refused(tmp_path):
    def tokenizer(text, verbose):
        return type("Encoding", (), {"input_ids": list(text.encode())})

    train, held_out = tokenised(tokenizer, ["a" * 300], 10)
    assert train.shape == (27, 11) and held_out.shape == (3, 11)
    assert len(tokenised(tokenizer, ["a" * 300], 10, tokens=150)[0]) == 13
    with pytest.raises(ValueError, match="the data is too short: expected 10 rows of 50 tokens and one, got 302"):
        tokenised(tokenizer, ["a" * 300], 50)
    with pytest.raises(ValueError, match="the data is too short: a batch has 512 tokens, got 36"):
        train_exits(tiny(), rows(3), EXITS, "kl", tmp_path, held_out={"a": rows(1)}, progress=False)
    with pytest.raises(ValueError, match="the data is too short: there must be rows to train on and held-out ones"):
        train_exits(tiny(), rows(3), EXITS, "kl", tmp_path / "b", held_out={}, progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(vocab_size=60, special_tokens=["?"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


TEXT = "we few we happy few we band of brothers for he today that sheds his blood with me shall be my brother " * 40


def command(saved, out, **options):
    given = {"model": saved, "data": saved / "text.txt", "exits": "0,2", "steps": 20, "batch": 64, "length": 16}
    given |= {"out": out} | options
    return ["train", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def test_command(saved, tmp_path, capsys):
    assert cli.main(command(saved, tmp_path / "out")) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:3]] == ["exit 0", "exit 2", "full depth"]
    assert said[3] == f"wrote {tmp_path / 'out' / HEADS_FILE}"
    assert list(ExitHeads.load(tmp_path / "out" / HEADS_FILE, tiny().config)) == EXITS


def test_nobody_calibrates_a_model_on_what_the_command_trained_it_on(saved, tmp_path, capsys):
    words = random.Random(0).choices(TEXT.split(), k=9000)  # phrases of 12 words that do not recur
    (tmp_path / "text.txt").write_text(" ".join(words))
    assert cli.main(command(saved, tmp_path / "out", data=tmp_path / "text.txt", train="last-1")) == 0
    capsys.readouterr()
    given = {"model": tmp_path / "out" / "model", "data": tmp_path / "text.txt", "out": tmp_path / "c.json", "exits": 2}
    given |= {"level": 0.4, "prompts": 100, "prompt-tokens": 8, "tokens": 40}
    assert cli.main(["calibrate", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]) == 2
    said = capsys.readouterr().err.strip()
    assert "calibration data must be apart from training data" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"exits": "0,3"}, "exits must lie in 0..2 for a model of 4 layers, got [0, 3]"),
        ({"objective": "ce + x"}, "objective terms must be"),
        ({"train": "some"}, "what to train must be"),
        ({"head": "some"}, "head must be translator or layer, got 'some'"),
        ({"model": "nowhere"}, "--model must be small, smollm2 or a folder with a model, got nowhere"),
        ({"data": "nowhere"}, "No such file or directory: 'nowhere'"),
        ({"learning-rate": 0}, "learning_rate must be larger than 0 and finite, got 0"),
        ({"out": __file__}, f"--out must be a folder, got {__file__}: {__file__} is a file"),
        ({"length": 5000}, "the data is too short"),
        ({"batch": 100000}, "the data is too short"),
    ],
)
def test_command_refuses_in_one_sentence(saved, tmp_path, capsys, options, sentence):
    assert cli.main(command(saved, **{"out": tmp_path / "out"} | options)) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and len(said.splitlines()) == 1


def test_a_loss_that_is_not_finite_is_one_sentence(saved, tmp_path, capsys, monkeypatch):
    def nan(self, batch):
        return batch[0].float().sum() * float("nan")

    monkeypatch.setattr(Recorded, "forward", nan)
    assert cli.main(command(saved, tmp_path)) == 2
    assert "the loss of batch 0 of 20 is nan" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(saved, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.os, "replace", full)
    assert cli.main(command(saved, tmp_path)) == 2
    said = capsys.readouterr().err.strip()
    assert "could not be written (No space left on device), nothing was written" in said
    assert len(said.splitlines()) == 1 and not list(tmp_path.rglob(".*"))


TOGETHER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from exeunt.training import recording, train_exits
from training.test_exits import EXITS, rows, tiny
recording.CHUNK = 4
heads = train_exits(tiny(), rows(40), EXITS, "kl + probe", sys.argv[1], held_out={"test": rows(8, seed=1)}, steps=10,
                    batch=64, progress=False)
assert "test" in heads.metadata["held_out"], heads.metadata
"""


@pytest.mark.slow
def test_two_processes_record_and_train_the_exits_that_one_does(tmp_path):
    pytest.importorskip("accelerate", reason="several processes need accelerate")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "train.py").write_text(TOGETHER)
    found = []
    for name, command in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*command, str(tmp_path / "train.py"), str(tmp_path / name), str(Path(__file__).parents[1])],
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / name / "states" / "train").glob("states-*.npy"))) == 10
        found.append(ExitHeads.load(tmp_path / name / HEADS_FILE, tiny().config))
    for one, two in zip(*(heads.parameters() for heads in found), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
