"""Docstrings of the public names: each argument with its type and unit, and what is raised."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shmring

CORE = Path(shmring.__file__).parent / "_core"

if shmring.backend != "ring":
    pytest.skip(
        "the stubs describe the compiled classes, not the fallback's", allow_module_level=True
    )

UNITS = {
    r"(\w+_)?timeout|\w+_interval|limit": r"\bseconds\b",
    r"size|length|offset|nbytes|(max_)?capacity|max_memory_per_worker": r"\bbytes\b",
}
# What one word says: the text names the method with the same arguments and errors.
AS_ANOTHER = re.compile(r"\bAs (for )?:(meth|class|func):`", re.IGNORECASE)


def stubs() -> dict[str, ast.FunctionDef]:
    """The methods of the compiled classes, by qualified name."""
    return {
        f"{kind.name}.{each.name}": each
        for path in CORE.glob("*.pyi")
        for kind in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(kind, ast.ClassDef)
        for each in kind.body
        if isinstance(each, ast.FunctionDef)
    }


# What is made by other calls than the constructor.
MADE_ELSEWHERE = {"Codec", "RegistrySlot", "Ring", "SharedArray", "Worker"}
WITHOUT_ERRORS = {
    "HighPerformanceIPC.close_message_queue",
    "HighPerformanceIPC.close_shared_memory",
    "HighPerformanceIPC.registry_entry",
    "ProcessPoolExecutor.shutdown",
    "RegistryEntry.is_silent",
    "RegistrySlot.count",
    "RegistrySlot.set_role",
    "RegistrySlot.waiting",
}

STUBS = stubs()


def public() -> Iterator[tuple[str, Any]]:
    """Every function and class of the package, and the public members of the classes."""
    for name in [*shmring.__all__, "SharedMemoryManager"]:
        obj = getattr(shmring, name)
        if callable(obj):
            yield name, obj
        if not inspect.isclass(obj) or issubclass(obj, enum.Enum):
            continue
        for member in dir(obj):
            home = next(each for each in (*obj.__mro__, type) if member in vars(each))
            ours = home.__module__.partition(".")[0] == "shmring"
            if ours and not member.startswith("_") and member not in fields(obj):
                yield f"{name}.{member}", inspect.getattr_static(obj, member)


def fields(obj: Any) -> dict[str, Any]:
    """The fields of a class whose constructor is made from them."""
    if dataclasses.is_dataclass(obj) or issubclass(obj, dict):
        return inspect.get_annotations(obj)
    return {}


def parameters(obj: Any) -> dict[str, bool]:
    """The names of the parameters or fields, and whether each has a type."""
    function = getattr(obj, "__func__", obj)
    if inspect.isclass(obj):
        if fields(obj):
            return dict.fromkeys(fields(obj), True)
        if issubclass(obj, Exception) or obj.__name__ in MADE_ELSEWHERE:
            return {}
        if "__init__" not in vars(obj):
            return {}
        function = vars(obj)["__init__"]
    stub = STUBS.get(getattr(function, "__qualname__", ""))
    if stub is not None and not hasattr(function, "__code__"):
        every = [*stub.args.posonlyargs, *stub.args.args, *stub.args.kwonlyargs]
        found = {each.arg: each.annotation is not None for each in every}
    elif callable(function):
        listed = inspect.signature(function).parameters
        found = {name: each.annotation is not each.empty for name, each in listed.items()}
    else:  # a property
        return {}
    return {name: typed for name, typed in found.items() if name not in ("self", "cls")}


PUBLIC = dict(public())


def text(name: str) -> str:
    return inspect.cleandoc(PUBLIC[name].__doc__ or "")


def items(text: str) -> dict[str, str]:
    """What stands under Args and Attributes."""
    found = re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", text, re.M)
    return {name: line for names, line in found for name in names.split(", ")}


def test_each_has_a_docstring() -> None:
    """A compiled attribute has none of its own; it stands in that of the class."""
    assert [
        name
        for name, obj in PUBLIC.items()
        if not text(name)
        if callable(obj) or name.partition(".")[2] not in items(text("Queue"))
    ] == []


def test_each_argument_has_a_type() -> None:
    assert [
        f"{name}({argument})"
        for name, obj in PUBLIC.items()
        for argument, typed in parameters(obj).items()
        if not typed
    ] == []


def test_each_argument_and_field_is_described_with_its_unit() -> None:
    missing = []
    for name, obj in PUBLIC.items():
        if AS_ANOTHER.search(text(name)):
            continue
        described = items(text(name))
        for each in parameters(obj):
            unit = next((unit for named, unit in UNITS.items() if re.fullmatch(named, each)), "")
            if each not in described or not re.search(unit, described[each]):
                missing.append(f"{name}({each})")
    assert missing == []


def test_what_takes_arguments_tells_its_errors() -> None:
    assert [
        name
        for name, obj in PUBLIC.items()
        if parameters(obj) and not (inspect.isclass(obj) and fields(obj))
        if not AS_ANOTHER.search(text(name)) and not re.search(r"^Raises:$", text(name), re.M)
        if name not in WITHOUT_ERRORS
    ] == []
