"""The split engine at work: devices, the wire between them, and the caller that starts runs.

Modules that had other names in 0.1 are still found under them, with a warning, until 0.3.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    f"{__name__}.{old}": f"{__name__}.{room}.{old}"
    for room, names in {
        "engine": "backoff controller epoch members monitor recovery returns segment session",
        "device": "crossing decode holding lending shard_host side speed",
        "wire": "listener messages",
    }.items()
    for old in names.split()
}


class _Moved(MetaPathFinder, Loader):
    """Gives the module of the new name, the same object, to whoever imports the old one."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = _MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "set by the import machinery, over the module's own"
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Moved())
