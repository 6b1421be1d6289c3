"""Who sends a request: the user whom its token names or, as long as there are no tokens, who it says it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from metakern.serve.limits import ApiError, valid_name
from metakern.serve.service import Service

__all__ = ["Caller", "Who"]

ANYBODY = "default"  # the user of requests that name none
BEARER = HTTPBearer(auto_error=False, description="a token of `metakern serve --add-token`")


@dataclass(frozen=True)
class Caller:
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


async def caller_of(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)] = None
) -> Caller:
    """Return who sends a request.

    Raises:
        ApiError: If there are tokens, and the request has no valid one.
    """
    service: Service = request.app.state.service
    token = given.credentials if given else ""
    if not service.store.has_tokens():
        return Caller(service, token if valid_name(token) else None, False)
    name = service.store.user_of(token)
    if name is None:
        raise ApiError(401, "a valid token is needed: send the header Authorization: Bearer TOKEN")
    return Caller(service, name, True)


Who = Annotated[Caller, Depends(caller_of)]
