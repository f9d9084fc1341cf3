"""What the documentation says is true: every public name says what the house asks for, every example runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import jaxnorm as jn

README = Path(__file__).parents[1] / "README.md"
PUBLIC = [(name, getattr(jn, name)) for name in jn.__all__]
PARTS = [(f"{part}.{name}", getattr(getattr(jn, part), name)) for part in ("tools", "inspect")
         for name in getattr(jn, part).__all__]  # fmt: skip
FUNCTIONS = [(name, thing) for name, thing in PUBLIC + PARTS if inspect.isroutine(thing)]
CLASSES = [(name, thing) for name, thing in PUBLIC if inspect.isclass(thing)]
MODULES = [
    module.name for module in pkgutil.walk_packages(jn.__path__, "jaxnorm.") if not module.name.endswith("__main__")
]
BLOCKS = [
    (README.read_text()[: found.start()].count("\n") + 2, found[1])
    for found in re.finditer(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
]


def test_the_public_names():
    assert len(set(jn.__all__)) == len(jn.__all__)
    assert {name for name, _ in FUNCTIONS} >= {
        "moments", "merge", "normalize", "standardize", "running_stats", "update", "empty_moments",
        "batch_norm", "layer_norm", "rms_norm", "instance_norm", "group_norm",
    }  # fmt: skip
    assert {name for name, _ in CLASSES} >= {"Moments", "RunningStats", "LayoutError", "AxisError"}


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_docstring_sections(name, function):
    doc = inspect.getdoc(function)
    first = doc.splitlines()[0]
    assert first.endswith("."), f"{name}: the first line is one sentence"
    places = [re.search(rf"^{section}\b.*:", doc, re.MULTILINE) for section in
              ("Args", "Returns", "Raises", "Example", "Source", "Differs from")]  # fmt: skip
    assert None not in places, f"{name}: {places}"
    assert [p.start() for p in places] == sorted(p.start() for p in places), f"{name}: sections out of order"
    arguments = doc[places[0].end() : places[1].start()]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^\s+.*(?<!\w)\*{{0,2}}{parameter}\b.*:", arguments, re.MULTILINE), f"{name}: {parameter}"
    example = doctest.DocTestParser().get_examples(doc[places[3].start() : places[4].start()])
    assert any(re.search(r"\d", line.want) for line in example), f"{name}: the example prints no number"


@pytest.mark.parametrize(("name", "cls"), CLASSES, ids=lambda v: v if isinstance(v, str) else "")
def test_classes_explain_themselves(name, cls):
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{name}("), f"{name} has only the docstring that dataclass writes"
    assert issubclass(cls, Exception) or ">>>" in cls.__doc__
    for member, value in vars(cls).items():
        if isinstance(value, property):
            assert value.__doc__, f"{name}.{member}"


def examples(module):
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    for test in examples(module):
        if test.name.removeprefix(f"{module}.") in jn.__all__:
            test.globs.clear()  # an example of a public name can be pasted: it imports what it uses
        report = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
        assert not report, "".join(report)


def test_no_public_example_is_missed():
    # functions under a decorator are easily missed by doctest
    found = {test.name for module in MODULES for test in examples(module)}
    assert found >= {f"{function.__module__}.{function.__name__}" for _, function in FUNCTIONS}


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=lambda v: f"line {v}" if isinstance(v, int) else "")
def test_readme(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(README), "exec"), {"__name__": "__readme__"})


def test_readme_has_code():
    assert len(BLOCKS) >= 3


def test_readme_has_the_table_of_norms():
    assert jn.norms().markdown() in README.read_text()
