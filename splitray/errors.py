"""The one way in which splitray refuses bad input; it knows nothing of models, devices or Ray."""

import difflib
from collections.abc import Iterable, Sequence

_MOST_SAID = 2000  # characters of each part of an error


class InputError(ValueError):
    """Bad input: says what was expected, what came and what to do. The CLI exits with code 2 on it."""

    def __init__(self, what: str, *, expected: object, actual: object, remedy: str) -> None:
        self.what, self.expected, self.actual, self.remedy = map(_short, (what, expected, actual, remedy))
        self.where = ""
        """The key of a document that is wrong, where `what` does not begin with it: devices[0].tier."""
        self.devices: tuple[str, ...] = ()
        """The devices that refused it, where devices did."""
        super().__init__(f"{self.what}: expected {self.expected}, got {self.actual}; {self.remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by fields, so that the error crosses process boundaries unchanged."""
        return (_rebuild, (type(self), self.what, self.expected, self.actual, self.remedy))


def unwritable(what: str, error: OSError | ValueError, *, expected: str = "a folder that can be written") -> InputError:
    """The error for a folder (or what else is expected) that a user names and that cannot be written."""
    return InputError(what, expected=expected, actual=error, remedy="give another one")


def _short(said: object) -> str:
    """As it is said, or its beginning: what came may be a file's worth of text."""
    text = str(said)
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]} ... ({len(text):,} characters)"


def _rebuild(cls: type[InputError], what: str, expected: str, actual: str, remedy: str) -> InputError:
    return cls(what, expected=expected, actual=actual, remedy=remedy)


def listed(items: Sequence[object], between: str = ", ", *, most: int = 8) -> str:
    """Items as text; of many the first ones, and how many more there are."""
    more = f"{between}... ({len(items) - most:,} more)" if len(items) > most else ""
    return between.join(map(str, items[:most])) + more


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """` (did you mean X?)` for the closest known name, to append to a remedy; empty if none is close."""
    close = difflib.get_close_matches(str(name)[:_MOST_SAID], [str(k) for k in known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class PlacementError(InputError):
    """A placement that leaves a piece out, gives it twice, or names what does not exist."""


class PlannerError(PlacementError):
    """A planner from outside the package that is wrong in itself: it raised, or proposed what is no placement."""


class TopologyError(InputError):
    """A topology or a link that cannot be used as asked."""


class ModelError(InputError):
    """A checkpoint or an architecture that cannot be run exactly."""


def unsplittable(what: str, expected: str, actual: object) -> ModelError:
    """The error for an architecture that cannot be split exactly."""
    remedy = "this architecture cannot be split; use another model"
    return ModelError(what, expected=expected, actual=actual, remedy=remedy)


class TokenizerError(ModelError):
    """A tokenizer that cannot be used; the model can, with ids."""


class Unsampled(ArithmeticError):  # noqa: N818 - a noun: what became of one request
    """The model's logits are no numbers to choose a token by: the request ends, whatever runs it goes on."""


class DeviceLost(RuntimeError):  # noqa: N818 - a noun: a state of the world, not a slip of the user
    """A device process died, closed its connection, or missed its deadline."""


class DeviceFailed(RuntimeError):  # noqa: N818 - likewise
    """A device lives and could not do what it was told: no memory, no file, a fault in a kernel."""

    def __init__(self, why: str, devices: tuple[str, ...]) -> None:
        super().__init__(why)
        self.devices = devices


class StartFailed(RuntimeError):  # noqa: N818 - likewise
    """Ray or Serve did not come up on this machine, or a Ray cluster cannot be joined."""
