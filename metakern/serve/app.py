"""The HTTP interface: OpenAI's completions, and what users teach.

Errors have OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, with these statuses: 400 for a request
that is not valid, 401 without a valid token, 403 for another user's data, 404, 405, 413 for too much, 429 for too often
(with Retry-After), 500 for a reply that failed, 503 for a full queue or a server that ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from math import isfinite
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

import metakern
from metakern.serve import schema
from metakern.serve.callers import Who
from metakern.serve.completions import add_completions
from metakern.serve.limits import ApiError, error_body, limited
from metakern.serve.metrics import exposition
from metakern.serve.page import add_page
from metakern.serve.service import Service
from metakern.serve.store import LimitError

__all__ = ["LOCAL", "create_app"]

log = logging.getLogger("metakern.serve")
LOCAL = ["localhost", "127.0.0.1", "[::1]"]


def create_app(service: Service, hosts: Sequence[str] = LOCAL) -> FastAPI:
    """Return the ASGI application of a service, which it closes when it ends.

    Args:
        service: The service.
        hosts: The names in the header Host that are answered, so that a page of another site can't reach a server on
            this machine by a name of its own; "*" stands for any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="metakern serve", description="A model for each user.", version=metakern.__version__, lifespan=lifespan
    )
    app.state.service = service
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    if service.settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.settings.cors, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(_Gate, service=service)
    _add_errors(app)
    add_completions(app, service)
    _add_users(app, service)
    _add_operation(app, service)
    add_page(app)
    return app


class _Gate:
    """Limits bodies, counts requests, and logs a line for each."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, limited(receive, self.service.settings.body), noted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self.service.requests.count(route, status)
            log.info("%s %s %d %.0f ms", scope["method"], route, status, 1000 * (time.monotonic() - began))


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, message: str, param: str | None = None, retry: float | None = None) -> JSONResponse:
        headers = {"Retry-After": str(max(1, round(retry)))} if retry else {}
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        return JSONResponse({"error": error_body(status, message, param)}, status, headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return answer(error.status, error.message, error.param, error.retry)

    @app.exception_handler(HTTPException)
    async def by_starlette(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        if first["type"] == "json_invalid":
            return answer(400, f"the body must be JSON: {first['ctx']['error']}")
        text = first["msg"].removeprefix("Value error, ")
        return answer(400, f"{param}: {text}" if param else text, param)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "the server made an error, which its log has")


def _add_users(app: FastAPI, service: Service) -> None:
    @app.post("/v1/users/{user}/exchanges", status_code=201)
    def teach(user: str, body: schema.TeachRequest, who: Who) -> schema.TaughtList:
        """Teach exchanges; the user's model is then adapted to all of them, in the background."""
        name, limit = who.user(user), service.settings.exchanges
        try:
            taught = service.store.teach(name, [(pair.say, pair.answer) for pair in body.exchanges], limit)
        except LimitError:
            raise ApiError(413, f"a user can have at most {limit} exchanges: delete some first") from None
        service.teacher.schedule(name)
        return schema.TaughtList(data=[schema.Taught(**asdict(exchange)) for exchange in taught])

    @app.get("/v1/users/{user}/exchanges")
    def exchanges(user: str, who: Who) -> schema.TaughtList:
        """List what was taught, oldest first."""
        taught = service.store.exchanges(who.user(user))
        return schema.TaughtList(data=[schema.Taught(**asdict(exchange)) for exchange in taught])

    @app.delete("/v1/users/{user}/exchanges")
    def forget_all(user: str, who: Who) -> schema.Removed:
        return _forgotten(who.user(user), None)

    @app.delete("/v1/users/{user}/exchanges/{exchange}")
    def forget(user: str, exchange: int, who: Who) -> schema.Removed:
        name = who.user(user)
        found = _forgotten(name, exchange)
        if not found.removed:
            raise ApiError(404, f"there is no exchange {exchange}", "exchange")
        return found

    def _forgotten(name: str, exchange: int | None) -> schema.Removed:
        removed = service.store.forget(name, exchange)
        if removed:
            service.teacher.schedule(name)
        return schema.Removed(removed=removed)

    @app.get("/v1/users/{user}/adapt")
    def adaptation(user: str, who: Who) -> schema.Adaptation:
        """Say how far the adaptation of the user's model is."""
        name = who.user(user)
        status, row = service.teacher.status(name), service.store.user(name)
        curve = [
            schema.Step(steps=p.steps, loss=p.loss if isfinite(p.loss) else None, right=p.right, replies=p.replies)
            for p in status.curve
        ]
        current = row is None or row.adapted == row.revision
        return schema.Adaptation(
            state=status.state, current=current, seconds=status.seconds, error=status.error, curve=curve
        )

    @app.delete("/v1/users/{user}")
    def delete(user: str, who: Who) -> schema.DeletedUser:
        """Delete all that is known of a user: exchanges, model, caches. Tokens stay valid."""
        name = who.user(user)
        deleted = service.delete(name)
        if deleted is None:
            raise ApiError(404, f"nothing is known of the user {name}", "user")
        return schema.DeletedUser(user=name, **asdict(deleted))


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    def health() -> Any:
        return {"status": "ok", "model": service.name}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        engine, teacher = service.engine, service.teacher
        return exposition(
            {
                "metakern_requests_total": ("counter", "requests by route and status", service.requests),
                "metakern_first_token_seconds": ("histogram", "time to the first token", service.first_token),
                "metakern_tokens_total": ("counter", "generated tokens", engine.tokens),
                "metakern_steps_total": ("counter", "calls of the model", engine.steps),
                "metakern_active_replies": ("gauge", "replies under way", engine.active),
                "metakern_waiting_requests": ("gauge", "replies that wait for a place in the batch", engine.waiting),
                "metakern_models_in_memory": ("gauge", "users' models in memory", service.models),
                "metakern_adaptations_total": ("counter", "finished adaptations", teacher.count),
                "metakern_adaptation_seconds_total": ("counter", "seconds that they took", teacher.seconds),
                "metakern_waiting_adaptations": ("gauge", "users who wait for an adaptation", teacher.waiting),
            }
        )
