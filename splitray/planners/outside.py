"""Planners from outside the package: `module:Class[:ARG]` from an import, and objects that Python code hands over."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from splitray.errors import InputError, PlacementError
from splitray.placement import Placement
from splitray.planners.checked import CheckedPlanner, raised_at
from splitray.planners.protocol import ClusterState, Freedom, Planner

USAGE = "module:Class[:ARG]"
_FLAGS = ("once", "heeds_queues", "charges_moves")


@dataclass(frozen=True, slots=True)
class _Function:
    """A function `propose(state)` as a planner."""

    propose: Callable[[ClusterState], Placement]


def imported(spec: str, meant: str = "") -> CheckedPlanner:
    """The planner that `module:Class[:ARG]` or `module:function` names; ARG may contain colons.

    `meant` is ` (did you mean X?)` where a known planner's name is close, for the message.

    Raises:
        PlacementError: the module, the class in it or the ARG is not there or not usable; says which.
    """
    module_name, _, rest = spec.partition(":")
    name, colon, argument = rest.partition(":")
    if not name or not all(module_name.split(".")) or bool(colon) != bool(argument) or "/" in module_name:
        remedy = f"write for example mine:Mine for the class Mine in mine.py of the working directory{meant}"
        raise _unusable("", f"{USAGE}, a dotted module and a class in it", repr(spec), remedy)
    found = _attribute(_module(spec, module_name, meant), name, spec)
    if isinstance(found, type):
        if callable(getattr(found, "propose", None)):  # one without is refused below, not built
            found = _built(found, argument, spec)
    elif colon:
        expected = f"{module_name}:{name} without an argument, for only a class takes one"
        raise _unusable(spec, expected, repr(argument), f"write {module_name}:{name}, or make it a class")
    return given(found, spec)


def given(planner: object, spec: str = "") -> CheckedPlanner:
    """A planner that is an object with `propose`, or a function `propose(state)`.

    `spec` is its name in reports; by default its attribute `spec` or `name`, else the name of its class or function.

    Raises:
        PlacementError: it cannot propose, or says of itself what no planner can be.
    """
    if isinstance(planner, CheckedPlanner):
        return planner
    is_class = isinstance(planner, type)
    of_class = planner if isinstance(planner, type) else type(planner)
    proposes = callable(getattr(planner, "propose", None))
    if is_class or not (proposes or callable(planner)):
        own = spec or of_class.__name__
        remedy = f"write {own}() for an object of it" if proposes else f"give {of_class.__name__} a propose(state)"
        actual = f"the class {own}" if is_class else f"{planner!r:.80}"
        raise _unusable(own, "an object with propose(ClusterState) -> Placement", actual, remedy)
    names = (spec, getattr(planner, "spec", ""), getattr(planner, "name", ""), getattr(planner, "__name__", ""))
    own = next((n for n in names if n and isinstance(n, str)), of_class.__name__)
    says: dict[str, Any] = {flag: getattr(planner, flag, False) for flag in _FLAGS}
    space: Any = getattr(planner, "space", "all")
    allowed: dict[str, tuple[object, ...]] = dict.fromkeys(_FLAGS, (True, False)) | {"space": get_args(Freedom)}
    for key, value in {**says, "space": space}.items():
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed[key]):
            expected = f"{key} to be one of {', '.join(map(str, allowed[key]))}"
            raise _unusable(own, expected, repr(value), f"correct the attribute {key}, or leave it out")
    most = getattr(planner, "most_devices", None)
    if most is not None and (type(most) is not int or most < 1):
        expected = "most_devices to be None or a whole number of 1 or more"
        raise _unusable(own, expected, repr(most), "correct the attribute most_devices, or leave it out")
    made: Planner = planner if proposes else _Function(planner)  # type: ignore[assignment, arg-type]
    return CheckedPlanner(own, made, space, **says, most_devices=most, outside=True)


def _module(spec: str, name: str, meant: str) -> ModuleType:
    """Import with the working directory on the path, where a console script has its own folder instead.

    During the import the directory stands first, so that a planner's file is found before an installed module of the
    same name. Afterwards it stands last: a planner may import a neighbour later, in `propose`, while no file there
    hides a library that splitray has yet to import.
    """
    here = str(Path.cwd())
    was_there = here in sys.path
    sys.path.insert(0, here)
    invalidate_caches()  # the file may be younger than what Python remembers of its folder
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        if not (isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")):
            expected = f"that the module {name} can be imported"
            raise _unusable(spec, expected, _told(error), "correct the module") from error
        remedy = f"correct the name{meant}, or run where the module is"
        if name.endswith(".py"):
            remedy = f"name the module and not its file: {spec.replace('.py:', ':', 1)}"
        expected = f"a known planner, or a module {name} in {here} or installed"
        raise _unusable(spec, expected, "neither", remedy) from error
    finally:
        with suppress(ValueError):  # a user's module may have changed the path itself
            sys.path.remove(here)
        if not was_there:
            sys.path.append(here)


def _attribute(module: ModuleType, name: str, spec: str) -> object:
    found = getattr(module, name, None)
    if found is not None:
        return found
    usable = [n for n, x in vars(module).items() if isinstance(x, type) and callable(getattr(x, "propose", None))]
    expected = f"a class {name} in {getattr(module, '__file__', None) or module.__name__}"
    there = f"planners there: {', '.join(usable) or 'none'}"
    raise _unusable(spec, expected, there, "name one of its classes with propose(state)")


def _built(planner: type, argument: str, spec: str) -> object:
    try:
        return planner(argument) if argument else planner()
    except InputError:
        raise  # says itself what is wrong
    except (Exception, SystemExit) as error:
        expected = f"that {planner.__name__}({repr(argument) if argument else ''}) makes a planner"
        remedy = "give the argument that it takes after a second colon, or correct the class"
        raise _unusable(spec, expected, _told(error), remedy) from error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}{raised_at(error)}"


def _unusable(spec: str, expected: str, actual: str, remedy: str) -> PlacementError:
    return PlacementError(f"planner {spec}".strip(), expected=expected, actual=actual, remedy=remedy)
