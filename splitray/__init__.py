"""splitray: one language model over weak edge devices and strong cloud workers, split finer than layers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitray.placement import Placement as Placement
    from splitray.runtime.hf import SplitModel as SplitModel
    from splitray.topology import Topology as Topology

__version__ = "0.1.0"
__all__ = ["Placement", "SplitModel", "Topology"]
_HOMES = {
    "Placement": "splitray.placement",
    "SplitModel": "splitray.runtime.hf",
    "Topology": "splitray.topology",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import splitray` loads neither torch nor Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module splitray has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
