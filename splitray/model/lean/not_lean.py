"""Why the lean loop does not run a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from splitray.model.layer_kinds import FAILURES


class NotLean(Exception):  # noqa: N818 - no fault: HF's own forward runs
    """A module is of no form that the lean loop knows; says which."""


@contextmanager
def trying() -> Iterator[None]:
    """Where HF's modules are tried in ways that they were not made for: what fails is not lean."""
    try:
        yield
    except FAILURES as error:
        raise NotLean(f"{type(error).__name__}: {error}") from error
