"""Every example in a docstring runs and prints what it says; every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import exeunt

# The extension modules are generated stubs and pointers; __main__ would run the command line.
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(exeunt.__path__, "exeunt.")
    if m.name not in ("exeunt._cpu", "exeunt._cuda", "exeunt._cuda_emu", "exeunt.__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        pytest.skip(f"{name} needs an optional package: {missing}")
    torch.manual_seed(0)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=vars(module).copy())
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


PUBLIC = [exeunt, *(thing for name in exeunt.__all__ if inspect.ismodule(thing := getattr(exeunt, name)))]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_public_callables_have_examples(module):
    for name in getattr(module, "__all__", []):
        thing = getattr(module, name)
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not name.startswith("_"):
            assert thing.__doc__, f"{module.__name__}.{name} has no docstring"
    functions = [getattr(module, n) for n in getattr(module, "__all__", []) if inspect.isfunction(getattr(module, n))]
    for function in functions:
        assert ">>>" in function.__doc__, f"{module.__name__}.{function.__name__} has no example"


def test_names_that_documents_use_are_there_after_import_exeunt():
    """In a process of its own: here other tests have imported the modules."""
    names = ("training.fit", "evaluation.plan", "small_lm.EXITS", "calibration.calibrating.calibrate",
             "calibration.live.live_losses", "calibration.shadow.Shadow")  # fmt: skip
    code = "\n".join([
        "import sys, exeunt",
        "assert not {'exeunt.training', 'exeunt.evaluation', 'exeunt.calibration.live'} & set(sys.modules), 'slow'",
        *(f"exeunt.{name}" for name in names),
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for module in (exeunt, exeunt.calibration):
        with pytest.raises(AttributeError, match=f"^module '{module.__name__}' has no attribute 'nothing'$"):
            module.nothing  # noqa: B018


def test_readme_example_runs(capsys):
    pytest.importorskip("transformers", reason="the README's example needs it")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "The following example shows how to use" in said and "decoding steps, 12 layers" in said


def test_the_page_of_systems_is_current():
    script = Path(__file__).parents[1] / "docs" / "make_systems.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
