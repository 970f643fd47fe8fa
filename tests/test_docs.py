"""Every example in a docstring runs and prints what it says; every public function and class has one."""

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


def imported(name):
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        pytest.skip(f"{name} needs an optional package: {missing}")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = imported(name)
    torch.manual_seed(0)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=vars(module).copy())
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", ["exeunt", *(m for m in MODULES if "._" not in m)])
def test_public_functions_and_classes_have_examples(name):
    module = imported(name)
    public = {n: getattr(module, n) for n in getattr(module, "__all__", ())}
    bare = [
        n
        for n, thing in public.items()
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and ">>>" not in (thing.__doc__ or "")
    ]
    assert not bare, f"{name}: no example in the docstring of {', '.join(bare)}"


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
