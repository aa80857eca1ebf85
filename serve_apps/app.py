"""The routes of the OpenAI API over a TextService. Runs under any ASGI server; knows no Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from serve_apps.api_error import ApiError, as_api_error, validation_error
from serve_apps.protocol import ChatRequest, CompletionRequest
from serve_apps.service import TextService, events, whole

T = TypeVar("T")


def make_app(service: TextService) -> FastAPI:
    """The routes; the end of the app's lifespan closes the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.queue.close)

    # The documentation pages load their scripts from a public site, which an edge node may not reach.
    app = FastAPI(title="splitray", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    model = {"id": service.model_name, "object": "model", "created": int(time.time()), "owned_by": "splitray"}

    @app.get("/health")
    async def health() -> Response:
        if service.queue.lost:
            return ApiError(503, service.queue.lost, code="device_lost").response()
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, body, request)

    return app


async def _answer(service: TextService, body: CompletionRequest | ChatRequest, request: Request) -> Response:
    try:
        # A chat template may take its time; nobody else waits for it.
        jobs = await asyncio.to_thread(service.jobs, body) if isinstance(body, ChatRequest) else service.jobs(body)
        reply = service.reply(body)
        pieces = service.pieces(jobs)
        if not body.stream:
            return JSONResponse(await _unless_gone(request, whole(reply, jobs, pieces)))
        # The status line waits for the first text, so that what the engine refuses still is a 400 or a 503.
        first = await _unless_gone(request, _next(pieces))
    except _ClientGone:
        return Response(status_code=499)
    except Exception as error:
        raise as_api_error(error) from error
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(reply, jobs, first, pieces), media_type="text/event-stream", headers=headers)


class _ClientGone(Exception):  # noqa: N818 - no error: nobody waits for the answer any more
    pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work, but cancel it when the client hangs up: ASGI servers only tell, they do not cancel."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _ClientGone
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(pieces: AsyncIterator[T]) -> T:
    return await anext(pieces)


async def _refuse(request: Request, error: Exception) -> Response:
    match error:
        case RequestValidationError():
            return validation_error(error.errors()).response()
        case HTTPException():
            headers = error.headers
            message = f"{request.method} {request.url.path}: {error.detail}"
            response = ApiError(error.status_code, message).response()
            response.headers.update(headers or {})
            return response
        case ApiError():
            return error.response()
    raise error
