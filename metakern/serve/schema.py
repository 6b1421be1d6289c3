"""Requests and responses: OpenAI's for completions, ours for users. An unknown or unsupported field is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["ChatRequest", "CompletionRequest", "TeachRequest"]

# Fields of OpenAI's interface that are accepted with these values, which ask for nothing.
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "store": False,
    "suffix": "",
    "tools": [],
    "top_logprobs": 0,
}
IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier"}  # they do not change a reply
MOST_CHOICES = 16


def _unicode(text: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must be Unicode text, got a lone surrogate")
    return text


Unicode = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Unicode, Field(min_length=1)]


class Part(BaseModel):
    """A part of a message that is given in parts."""

    type: Literal["text"]
    text: Unicode


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Unicode | list[Part]
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _joined(cls, content: str | list[Part]) -> str:
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        if not text.strip():
            raise ValueError("must hold text")
        return text

    @property
    def text(self) -> str:
        return str(self.content)


class StreamOptions(BaseModel):
    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: Unicode
    max_tokens: int | None = Field(None, ge=1, description="default: as many as the window has room for")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="default: 0.7")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="default: 0.9")
    stop: Unicode | list[Text] | None = None
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _supported(self) -> Sampling:
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value is not None and value != NEUTRAL.get(name):
                raise ValueError(f"{name} is not supported: leave it out")
        if len(self.stops) > 4:
            raise ValueError(f"stop must hold at most 4 texts, got {len(self.stops)}")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or [])


class ChatRequest(Sampling):
    """A conversation whose next message is asked for."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _answerable(self) -> ChatRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError("messages must end with one that the bot can answer, got the role assistant")
        return self


class CompletionRequest(Sampling):
    """Texts to continue."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Pair(BaseModel):
    """An exchange: what the user says, and what the bot should answer."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    say: str = Field(min_length=1, max_length=4000)
    answer: str = Field(min_length=1, max_length=4000)


class TeachRequest(BaseModel):
    """Exchanges to teach."""

    model_config = ConfigDict(extra="forbid")

    exchanges: list[Pair] = Field(min_length=1)


class Taught(BaseModel):
    """An exchange in the store; `created` is in seconds since 1970."""

    id: int
    say: str
    answer: str
    created: float


class TaughtList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Taught]


class Removed(BaseModel):
    """How many exchanges were removed."""

    removed: int


class Step(BaseModel):
    """The state of the model after a number of inner steps; `loss` is None if it is not finite."""

    steps: int
    loss: float | None
    right: int
    replies: int


class Adaptation(BaseModel):
    """How far the adaptation of a user's model is.

    `current` says whether what was taught last is in the model that answers. `curve` has the progress after each inner
    step of the last adaptation since the server's start.
    """

    state: Literal["waiting", "adapting", "ready", "failed"]
    current: bool
    seconds: float
    error: str
    curve: list[Step]


class DeletedUser(BaseModel):
    """What was removed; `vacuumed` says whether the store's file was rewritten without it."""

    user: str
    exchanges: int
    adapter: bool
    vacuumed: bool
