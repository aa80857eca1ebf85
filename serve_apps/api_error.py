"""How the API says no: OpenAI's error shape and what becomes which status. Knows no routes."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import Response

from splitray.errors import DeviceLost, InputError, Unsampled

logger = logging.getLogger(__name__)
_MOST_SAID = 4000  # characters of a message, which may quote a request


class ApiError(Exception):
    """A refusal or a failure, in the shape the OpenAI clients parse."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        short = message if len(message) <= _MOST_SAID else f"{message[:_MOST_SAID]} ..."
        self.status, self.message, self.param, self.code = status, short, param, code
        super().__init__(short)

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP answer; ASCII JSON, because a message may quote a lone surrogate of the request."""
        return Response(json.dumps(self.body), status_code=self.status, media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """What the client is told. A failure of ours goes to the log in full, to the client by name only."""
    match error:
        case ApiError():
            return error
        case InputError():
            return ApiError(400, str(error))
        case DeviceLost():
            return ApiError(503, f"the engine lost a device: {error}", code="device_lost")
        case Unsampled():
            return ApiError(500, str(error), code="not_sampled")
    logger.error("generation failed", exc_info=error)
    return ApiError(500, f"generation failed: {type(error).__name__}; the server's log has the details")


def validation_error(errors: Sequence[Any]) -> ApiError:
    """One 400 from pydantic's list: the first field at fault with everything said about it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}")
    path = first["loc"][1:]
    if not path:
        return ApiError(400, "expected a JSON object with Content-Type: application/json")
    param = str(path[0])
    about = [e for e in errors if e["loc"][1:2] == path[:1]]
    said = dict.fromkeys(f"{'.'.join(str(p) for p in e['loc'][1:])}: {e['msg']}" for e in about)
    return ApiError(400, "; ".join(said), param=param)
