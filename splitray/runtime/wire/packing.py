"""Orders and answers as bytes, and back: the one place that packs and checks them."""

from typing import Generic, TypeVar, Union, dataclass_transform

import msgspec
import numpy as np

from splitray.errors import InputError, did_you_mean


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Packable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen dataclass that refuses fields which it does not know."""


_REMEDY = "run the same version of splitray on every device"
Packed = bytes | bytearray | memoryview
M = TypeVar("M", bound=Packable)


def _plain(value: object) -> object:
    """Numbers that came out of numpy."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a message")


to_plain = msgspec.structs.asdict
"""The fields of a message as a dict."""
pack = msgspec.msgpack.Encoder(enc_hook=_plain).encode
"""A message as msgpack: a map of its name and its fields."""


class Vocabulary(Generic[M]):
    """All messages of one kind: reads bytes back into them and refuses whatever is none of them."""

    def __init__(self, base: type[M]) -> None:
        """Of the subclasses of `base` that there are by now; each has a name, told by its struct's tag."""
        self._kind = str(base.__struct_config__.tag_field)
        self.types: dict[str, type[M]] = {str(t.__struct_config__.tag): t for t in base.__subclasses__()}
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(Union[tuple(self.types.values())])  # noqa: UP007

    def unpack(self, raw: Packed) -> M:
        """The message that these bytes are.

        Raises:
            InputError: an unknown name, a field that is missing, unknown or of a wrong type, or no msgpack at all; says
                which message and which field.
        """
        try:
            return self._decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            name = self._name(raw)
            if name is not None and name not in self.types:
                raise InputError(
                    f"name of the {self._kind}",
                    expected=f"one of {sorted(self.types)}",
                    actual=repr(name),
                    remedy=_REMEDY + did_you_mean(name, self.types),
                ) from error
            raise InputError(
                self._kind if name is None else f"{self._kind} {name!r}",
                expected="its fields, each of its type",
                actual=str(error),
                remedy=_REMEDY,
            ) from error

    def _name(self, raw: Packed) -> object:
        try:
            return msgspec.msgpack.decode(raw, type=dict[str, object]).get(self._kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
