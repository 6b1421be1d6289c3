"""The HTTP interface: OpenAI's completions, and what users teach.

Errors have OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, with these statuses: 400 for a request
that is not valid, 401 without a valid token, 403 for another user's data, 404, 405, 413 for too much, 429 for too often
(with Retry-After), 500 for a reply that failed, 503 for a full queue or a server that ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

import metakern
from metakern.dialogue.readers import Turn
from metakern.serve import engine, schema
from metakern.serve.limits import ApiError, limited, valid_name
from metakern.serve.metrics import exposition
from metakern.serve.service import Service
from metakern.serve.store import LimitError
from metakern.serve.text import Writer

__all__ = ["create_app"]

log = logging.getLogger("metakern.serve")
LOCAL = ["localhost", "127.0.0.1", "[::1]"]
BASE = "-base"  # what follows the run's name in the name of its model without adaptation
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "bot"}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
POLL = 0.5  # seconds after which a client without news is looked for
TEMPERATURE, TOP_P = 0.7, 0.9
ANYBODY = "default"  # the user of requests that name none
BEARER = HTTPBearer(auto_error=False, description="a token of `metakern serve --add-token`")
FAILURES = {
    "diverged": (500, "the model's logits are not finite: teach something else, or retrain the run"),
    "failed": (500, "the reply failed by an error, which the server's log has"),
    "cancelled": (409, "the user was deleted during the reply"),
    "shutdown": (503, "the server ends"),
}


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
    _add_completions(app, service)
    _add_users(app, service)
    _add_operation(app, service)
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
        return JSONResponse({"error": _error(status, message, param)}, status, headers)

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


def _error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": None}


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    def models(who: Who) -> Any:
        return {"object": "list", "data": [_model(service.name + end) for end in ("", BASE)]}

    @app.get("/v1/models/{model}")
    def model(model: str, who: Who) -> Any:
        _is_base(service, model)
        return _model(model)

    @app.post("/v1/chat/completions")
    async def chat(body: schema.ChatRequest, request: Request, who: Who) -> Response:
        turns = [Turn(ROLES[message.role], message.text) for message in body.messages]
        tokens = body.max_completion_tokens or body.max_tokens
        reply = _Reply(service, body, who.user(body.user), [turns] * (body.n or 1), tokens, chat=True)
        return await reply.response(request)

    @app.post("/v1/completions")
    async def completions(body: schema.CompletionRequest, request: Request, who: Who) -> Response:
        """Each prompt is taken as a message of the user, as the model knows nothing but conversations."""
        conversations = [[Turn("user", text)] for text in body.prompts for _ in range(body.n or 1)]
        reply = _Reply(service, body, who.user(body.user), conversations, body.max_tokens, chat=False)
        return await reply.response(request)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "metakern"}


def _is_base(service: Service, model: str) -> bool:
    """Return whether a model's name stands for the run's model without adaptation."""
    if model not in (service.name, service.name + BASE):
        raise ApiError(404, f"model must be {service.name} or {service.name}{BASE}, got {model[:80]!r}", "model")
    return model != service.name


@dataclass(frozen=True)
class _Caller:
    """Who sends a request: the user whom a token of the store names (`proven`), or who it says it is."""

    service: Service
    name: str | None
    proven: bool

    def user(self, asked: str | None = None) -> str:
        """Return the user whom a request is for, and count the request.

        Args:
            asked: The user whom the request names.

        Raises:
            ApiError: If that is another user than the token's, or the name is not valid, or for too many requests.
        """
        name = self.name if self.proven else asked or self.name or ANYBODY
        if name is None or not valid_name(name):
            raise ApiError(400, "user must have up to 64 letters, digits and ._@-, and begin with one of the first two")
        if asked not in (None, "", name):
            raise ApiError(403, "user must be the one whom your token names", "user")
        if wait := self.service.rates.wait(name):
            raise ApiError(429, f"at most {self.service.settings.rate:g} requests a minute are answered", retry=wait)
        return name


def _caller(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)] = None) -> _Caller:
    service: Service = request.app.state.service
    token = given.credentials if given else ""
    if not service.store.has_tokens():
        return _Caller(service, token if valid_name(token) else None, False)
    name = service.store.user_of(token)
    if name is None:
        raise ApiError(401, "a valid token is needed: send the header Authorization: Bearer TOKEN")
    return _Caller(service, name, True)


Who = Annotated[_Caller, Depends(_caller)]


class _Reply:
    """The replies of one request, its choices, from the engine to the client."""

    def __init__(
        self,
        service: Service,
        body: schema.Sampling,
        user: str,
        conversations: Sequence[Sequence[Turn]],
        tokens: int | None,
        chat: bool,
    ) -> None:
        self.service, self.body, self.chat, self.began = service, body, chat, time.monotonic()
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.events: asyncio.Queue[tuple[int, list[int], str | None]] = asyncio.Queue()
        tokenizer, length = service.run.tokenizer, service.run.config.max_length
        resident = service.resident(user, _is_base(service, body.model))
        prompts = [tokenizer.prompt(turns, length, "bot") for turns in conversations]
        self.prompt_tokens = len(prompts[0]) if chat else sum(map(len, prompts))
        self.writers = [Writer(tokenizer.decode, body.stops) for _ in prompts]
        self.requests = [
            engine.Request(
                resident,
                prompt,
                max_new_tokens=min(tokens or length, length - len(prompt)),
                emit=self._emit(i),
                temperature=TEMPERATURE if body.temperature is None else body.temperature,
                top_p=TOP_P if body.top_p is None else body.top_p,
                seed=None if body.seed is None else body.seed + i,
                stream=bool(body.stream or body.stops),
            )
            for i, prompt in enumerate(prompts)
        ]
        try:
            service.engine.submit(self.requests)
        except engine.FullError:
            raise ApiError(503, "too many requests are waiting: try later", retry=1) from None
        if service.settings.log_texts:
            log.info("%s %s says: %s", self.id, user, conversations[0][-1].text)

    def _emit(self, index: int) -> Callable[[list[int], str | None], None]:
        """Return a function that puts news of a choice into `events`, from the engine's thread."""
        loop = asyncio.get_running_loop()

        def emit(ids: list[int], reason: str | None) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.events.put_nowait, (index, ids, reason))

        return emit

    async def response(self, request: Request) -> Response:
        if self.body.stream:
            return StreamingResponse(self._stream(), media_type="text/event-stream")
        texts, reasons = [""] * len(self.requests), [""] * len(self.requests)
        async for index, text, reason in self._news(request):
            texts[index] += text
            reasons[index] = reason or ""
        choices = [
            {"index": i, **({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text})}
            | {"finish_reason": reason, "logprobs": None}
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return JSONResponse(self._envelope(kind, choices) | {"usage": self._usage()})

    async def _stream(self) -> AsyncIterator[str]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"

        def event(index: int, text: str, reason: str | None, **more: str) -> str:
            said = {"delta": more | ({"content": text} if text or more else {})} if self.chat else {"text": text}
            choice = {"index": index, **said, "finish_reason": reason, "logprobs": None}
            return _sse(self._envelope(kind, [choice]))

        try:
            for i in range(len(self.requests) if self.chat else 0):
                yield event(i, "", None, role="assistant")
            async for index, text, reason in self._news():
                if text or reason:
                    yield event(index, text, reason)
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _sse(self._envelope(kind, []) | {"usage": self._usage()})
        except ApiError as error:
            yield _sse({"error": _error(error.status, error.message)})
        yield "data: [DONE]\n\n"

    async def _news(self, request: Request | None = None) -> AsyncIterator[tuple[int, str, str | None]]:
        """Yield `(index, text, reason)` until all choices have a reason; then, or if the client goes, end them.

        Raises:
            ApiError: If a reply failed.
        """
        going = set(range(len(self.requests)))
        try:
            while going:
                try:
                    index, ids, reason = await asyncio.wait_for(self.events.get(), POLL if request else None)
                except asyncio.TimeoutError:
                    if request and await request.is_disconnected():
                        raise ApiError(499, "the client has gone") from None
                    continue
                if index not in going:
                    continue
                if reason in FAILURES:
                    raise ApiError(*FAILURES[reason])
                if not self.writers[index].ids and ids:
                    self.service.first_token.observe(time.monotonic() - self.began)
                text = self.writers[index].add(ids, last=reason is not None)
                if self.writers[index].stopped and reason is None:
                    self.requests[index].cancelled, reason = True, "stop"
                elif self.writers[index].stopped:
                    reason = "stop"
                if reason:
                    going.discard(index)
                yield index, text, reason
            if self.service.settings.log_texts:
                log.info("%s replies: %s", self.id, self.service.run.tokenizer.decode(self.writers[0].ids))
        finally:
            for each in self.requests:
                each.cancelled = True

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        created = int(time.time())
        return {"id": self.id, "object": kind, "created": created, "model": self.body.model, "choices": choices}

    def _usage(self) -> dict[str, int]:
        new = sum(len(writer.ids) for writer in self.writers)
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": new}
        return counts | {"total_tokens": self.prompt_tokens + new}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _add_users(app: FastAPI, service: Service) -> None:
    @app.post("/v1/users/{user}/exchanges", status_code=201)
    def teach(user: str, body: schema.TeachRequest, who: Who) -> schema.TaughtList:
        """Teach exchanges; the user's model is then adapted to all of them, in the background."""
        name, limit = who.user(user), service.settings.exchanges
        try:
            taught = service.store.teach(name, [(pair.say, pair.answer) for pair in body.exchanges], limit)
        except LimitError:
            raise ApiError(413, f"a user can have at most {limit} exchanges: delete some first") from None
        service.changed(name)
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
            service.changed(name)
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
