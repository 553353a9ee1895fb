"""What the docstrings of imported modules say, each object once and under the name that its users write."""

import enum
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["module", "class", "function", "method", "attribute", "topic"]

MAX_TITLE_CHARS = 200
MAX_SIGNATURE_CHARS = 300
_MIN_DOC_CHARS = 20
_GENERIC_ATTRIBUTE = re.compile(r"Alias for field number")
_GENERIC_SPECIAL = re.compile(
    r"Return (self|repr|str|hash|len|getattr|key in|a generator|state information|value\b|[-+~]self|abs)|Implement "
    r"|See help\(type|Initialize self|Create and return a new|Helper for pickle|Default object formatter|Default dir"
    r"|Size of object in memory|See PEP|True if self|This method is called when a class is subclassed"
    r"|Abstract classes can override|list of weak references|dictionary for instance|\w+\.__"
)
_PLAIN_VALUES = (types.NoneType, bool, int, float, types.EllipsisType)
_MAX_PLAIN_TEXT_CHARS = 40
_ANY_ATTRIBUTE = (property, types.GetSetDescriptorType, types.MemberDescriptorType, functools.cached_property)


@dataclass(frozen=True, slots=True)
class Entry:
    """The documentation of one object; *id* is its public dotted name, *text* its signature and docstring."""

    id: str
    kind: Kind
    module: str
    name: str
    title: str
    text: str
    signature: str = ""


class Collector:
    """Goes through modules in the order given; an object belongs to the first of them that offers it."""

    def __init__(self) -> None:
        # Holds the objects themselves, because an identity may be used again once its object is gone.
        self._claimed: dict[int, object] = {}
        self._public_classes: set[int] = set()
        self._ids: set[str] = set()

    def module(self, name: str, module: types.ModuleType) -> Iterator[Entry]:
        """Yield the module's own entry, then its functions, then its classes with their methods, each by name."""
        if self._claim(module):
            yield from self._entry(name, "module", name, "", _own_doc(module))
        prefix = "" if name == "builtins" else f"{name}."
        members = list(_public_members(name, module))
        self._public_classes.update(id(member) for _, member in members if isinstance(member, type))
        # Functions first: random.choice is better known than random.Random.choice, which is the same object.
        for attribute, member in members:
            if _is_function(member) and self._claim(member):
                yield from self._entry(f"{prefix}{attribute}", "function", name, _signature(member), _own_doc(member))
        for attribute, member in members:
            if isinstance(member, type) and self._claim(member):
                yield from self._class(f"{prefix}{attribute}", name, member)
            elif _is_special_form(member) and self._claim(member):
                yield from self._entry(f"{prefix}{attribute}", "class", name, "", _own_doc(member))

    def _class(self, dotted: str, module: str, cls: type) -> Iterator[Entry]:
        doc = cls.__dict__.get("__doc__")
        yield from self._entry(dotted, "class", module, _signature(cls), doc if isinstance(doc, str) else "")
        # Methods of a private base are its public subclasses' own, as far as a reader is concerned.
        hidden = [base for base in cls.__mro__[1:] if self._is_hidden(base)]
        shown = [base for base in cls.__mro__[1:] if base not in hidden]
        members = {name: raw for base in (*reversed(hidden), cls) for name, raw in base.__dict__.items()}
        for attribute, raw in sorted(members.items()):
            member = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
            is_attribute = isinstance(member, _ANY_ATTRIBUTE)
            if not (is_attribute or _is_function(member)) or isinstance(member, types.WrapperDescriptorType):
                continue
            doc = _own_doc(member)
            if not _is_worth_reading(attribute, doc) or _is_inherited(shown, attribute, doc) or not self._claim(member):
                continue
            signature = "" if is_attribute else _signature(member, bound=not isinstance(raw, staticmethod))
            kind: Kind = "attribute" if is_attribute else "method"
            yield from self._entry(f"{dotted}.{attribute}", kind, module, signature, doc)

    def _is_hidden(self, base: type) -> bool:
        is_private = base.__name__.startswith("_") or any(part.startswith("_") for part in base.__module__.split("."))
        return is_private and id(base) not in self._public_classes

    def _claim(self, value: object) -> bool:
        owner = getattr(value, "__func__", value)
        if id(owner) in self._claimed:
            return False
        self._claimed[id(owner)] = owner
        return True

    def _entry(self, dotted: str, kind: Kind, module: str, signature: str, doc: str) -> Iterator[Entry]:
        doc = inspect.cleandoc(doc).strip()
        name = dotted.rpartition(".")[2]
        if len(doc) < _MIN_DOC_CHARS or dotted in self._ids or _is_generated(name, doc):
            return
        self._ids.add(dotted)
        # C functions without a signature that can be inspected say it in the first line of their docstring.
        if not signature and kind not in ("module", "attribute"):
            signature, doc = _signature_in(doc, name)
        shown = _bounded(signature, MAX_SIGNATURE_CHARS)
        title = _bounded(f"{dotted}{signature}", MAX_TITLE_CHARS)
        yield Entry(dotted, kind, module, name, title, f"{dotted}{shown}\n\n{doc}".rstrip(), shown)


def _public_members(name: str, module: types.ModuleType) -> Iterator[tuple[str, object]]:
    listed = getattr(module, "__all__", None)
    for attribute in sorted(set(listed if listed is not None else vars(module))):
        if attribute.startswith("_"):
            continue
        member = _member(module, attribute)
        if listed is not None or _is_defined_in(name, member):
            yield attribute, member


def _member(module: types.ModuleType, attribute: str) -> object:
    try:
        return getattr(module, attribute)
    # Lazily loaded members need what may be missing.
    except Exception:
        return None


def _is_defined_in(module: str, member: object) -> bool:
    """Whether *member* is the module's own, or comes from a private module behind it, and is not just imported."""
    origin = getattr(member, "__module__", None)
    if not isinstance(origin, str):
        return isinstance(member, types.BuiltinFunctionType)
    package = module.partition(".")[0]
    is_private = any(part.startswith("_") for part in origin.split("."))
    return origin == module or (is_private and origin.lstrip("_").startswith((package, f"frozen_{package}")))


def _is_function(member: object) -> bool:
    if inspect.isroutine(member):
        return True
    # What functools.lru_cache and its like return.
    return not isinstance(member, type) and callable(member) and "__wrapped__" in getattr(member, "__dict__", {})


def _is_special_form(member: object) -> bool:
    return isinstance(member, typing._SpecialForm) and _own_doc(member) != type(member).__doc__


def _own_doc(member: object) -> str:
    doc = getattr(member, "__doc__", None)
    return doc if isinstance(doc, str) else ""


def _is_worth_reading(attribute: str, doc: str) -> bool:
    if attribute.startswith("__") and attribute.endswith("__"):
        return not _GENERIC_SPECIAL.match(doc.lstrip())
    return not attribute.startswith("_") and not _GENERIC_ATTRIBUTE.match(doc.lstrip())


def _is_inherited(bases: Iterable[type], attribute: str, doc: str) -> bool:
    return any(_own_doc(base.__dict__.get(attribute)) == doc for base in bases)


def _is_generated(name: str, doc: str) -> bool:
    """Whether the docstring only repeats a signature, as those of data classes and named tuples do."""
    return "\n" not in doc and re.fullmatch(rf"{re.escape(name)}\(.*\)( -> None)?", doc) is not None


def _signature(member: Any, *, bound: bool = False) -> str:
    """The signature as text without the first parameter of a *bound* method; empty where there is none to inspect."""
    try:
        signature = inspect.signature(member)
        parameters = [_without_state(parameter) for parameter in signature.parameters.values()]
        if bound and parameters and parameters[0].name in ("self", "cls", "type"):
            del parameters[0]
        return str(signature.replace(parameters=parameters))
    # Not only ValueError: annotations may fail to evaluate, and default values to be shown.
    except Exception:
        return ""


@dataclass(frozen=True, slots=True)
class _Shown:
    """Stands for a default value; its representation is *text*."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _without_state(parameter: inspect.Parameter) -> inspect.Parameter:
    """Show a default only where it is plain: others print addresses, the user's paths, or a whole os.environ."""
    default = parameter.default
    if default is parameter.empty or _is_plain(default):
        return parameter
    name = getattr(default, "__qualname__", "") if isinstance(default, type | types.FunctionType) else ""
    return parameter.replace(default=_Shown(name if name and "<" not in name else "..."))


def _is_plain(value: object) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= _MAX_PLAIN_TEXT_CHARS and not any(mark in str(value) for mark in ("/", "\\"))
    if isinstance(value, tuple):
        return len(value) <= 10 and all(_is_plain(item) for item in value)
    return type(value) in _PLAIN_VALUES or isinstance(value, enum.Enum)


def _signature_in(doc: str, name: str) -> tuple[str, str]:
    """The signature that *doc* begins with, if it does, and what is left of it."""
    found = re.match(rf"(?:\w+\.)*{re.escape(name)}(\(.*?\)(?: ?--?> ?.+)?)[ .:]*(?:\n|$)", doc)
    return (found.group(1), doc[found.end() :].lstrip("\n")) if found else ("", doc)


def _bounded(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
