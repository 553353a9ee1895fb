"""The project's own rules, as tests: see CONTRIBUTING.md."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import services
import tercet
from services.common import errors
from services.common.http_errors import STATUS
from services.common.settings import ServiceSettings
from tests.conventions import settings_doc

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "services").rglob("*.py"), *(ROOT / "tercet").rglob("*.py")])
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60


def _subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def test_every_error_has_a_status():
    """Each class of the error tree has a row of its own in the one status table."""
    tree = {errors.TercetError, *(cls for cls in _subclasses(errors.TercetError) if cls.__module__ == errors.__name__)}
    assert tree == set(STATUS)


def test_every_error_is_drawn():
    """The tree in the module's docstring names every class."""
    for cls in _subclasses(errors.TercetError):
        if cls.__module__ == errors.__name__:
            assert re.search(rf"── {cls.__name__}\b", errors.__doc__ or ""), cls.__name__


def test_settings_page_is_what_the_classes_say():
    """docs/settings.md documents every setting, with its true default."""
    assert settings_doc.PAGE.read_text() == settings_doc.render()


def test_every_setting_is_described():
    """A setting without a description could not be documented."""
    for package in (services, tercet):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith(".settings"):
                importlib.import_module(module.name)
    for cls in _subclasses(ServiceSettings):
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_states_its_purpose_and_stays_small(path: Path):
    """Every module begins with what it is for; a long file or function usually holds two ideas."""
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "no docstring"
    assert source.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_loose_ends(path: Path):
    """No marker of unfinished work, and no absolute path of somebody's machine, is in the product."""
    assert not re.search(r"#\s*(TODO|FIXME|XXX|HACK)\b|(?<![\w.])/(?:home|root)/", path.read_text())


def test_constraints_pin_every_direct_dependency():
    """constraints.txt says which version of each dependency was tested."""
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    text = (ROOT / "pyproject.toml").read_text()
    names = {name.lower() for name in re.findall(r'^\s+"([A-Za-z0-9_.-]+)(?:\[\w+\])?>=', text, re.MULTILINE)}
    assert names
    assert names <= pinned


def test_no_upper_bounds_on_dependencies():
    """Installing Tercet into an existing environment never downgrades what the pins do not need."""
    text = (ROOT / "pyproject.toml").read_text()
    assert not re.findall(r'^\s+"[A-Za-z0-9_.\[\]-]+[^"]*(?:<|==)[^"]*",$', text, re.MULTILINE)
