"""Why the lean loop does not run a model."""


class NotLean(Exception):  # noqa: N818 - no fault: HF's own forward runs
    """A module is of no form that the lean loop knows; says which."""
