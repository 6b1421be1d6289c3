"""OpenAI's completions: from the conversation of a request to its replies, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from metakern.dialogue.readers import Turn
from metakern.serve import engine, schema
from metakern.serve.callers import Who
from metakern.serve.limits import ApiError, error_body
from metakern.serve.service import Service
from metakern.serve.text import Writer

__all__ = ["add_completions"]

log = logging.getLogger("metakern.serve")
BASE = "-base"  # what follows the run's name in the name of its model without adaptation
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "bot"}
TEMPERATURE, TOP_P = 0.7, 0.9
POLL = 0.5  # seconds after which a client without news is looked for
FAILURES = {
    "diverged": (500, "the model's logits are not finite: teach something else, or retrain the run"),
    "failed": (500, "the reply failed by an error, which the server's log has"),
    "cancelled": (409, "the user was deleted during the reply"),
    "shutdown": (503, "the server ends"),
}


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the routes of OpenAI's interface."""

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
            yield _sse({"error": error_body(error.status, error.message)})
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
