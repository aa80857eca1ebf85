"""Where a device listens, and the secret that its cluster shares."""

import secrets
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a device listens: an abstract Unix socket of its node, and a TCP address."""

    unix: str
    host: str
    port: int


def new_token() -> bytes:
    """A fresh secret for one cluster."""
    return secrets.token_bytes(32)
