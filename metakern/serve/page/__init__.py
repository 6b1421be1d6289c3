"""The web page of the server: files that ask no other host, without a build step.

The browser enforces what the page promises by its Content-Security-Policy: scripts and styles are these files alone,
requests go to this server alone, and a text can't become markup, as no script may write HTML.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

__all__ = ["FILES", "add_page"]

FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`, and the other files beside it."""
    for name, kind in FILES.items():
        _add(app, "/" if name == "index.html" else f"/{name}", Path(__file__).with_name(name).read_bytes(), kind)


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    def file() -> Response:
        return Response(content, headers=HEADERS, media_type=kind)
