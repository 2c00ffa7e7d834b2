"""The playground's files: `/` and `/ui/...`, for `idlm serve --ui` and `idlm ui`.

The page holds nothing of the server and needs no key; its scripts ask for the key and then use the
API like any client.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import Request, Response

from idlm.errors import InputError
from idlm.serving.document import strict_router
from idlm.serving.errors import ApiError

PACKAGE, FOLDER = "idlm.ui", "page"
INDEX = "index.html"
ASSETS = {"app.js": "text/javascript", "app.css": "text/css", "icon.svg": "image/svg+xml"}
"""Files beside the index, by name, with their types."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self' http: https:",  # a race may have lanes on other servers
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The page runs scripts of this server alone, none of them inline, and is in nobody's frame."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
router = strict_router()


def read(name: str) -> bytes:
    """A file of the page.

    Raises:
        InputError: this installation has no built page.
    """
    try:
        return (files(PACKAGE) / FOLDER / name).read_bytes()
    except FileNotFoundError:
        raise InputError(f"the page's file {name} is missing; run 'make web'") from None


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The playground."""
    return Response(read(INDEX), media_type="text/html; charset=utf-8", headers=HEADERS)


@router.get("/ui/{asset}", include_in_schema=False)
async def asset(request: Request, asset: str) -> Response:
    """A script, a style or an image of the page."""
    if asset not in ASSETS:
        raise ApiError(404, f"/ui has no file {asset[:80]!r}")
    kind = f"{ASSETS[asset]}; charset=utf-8"
    return Response(read(asset), media_type=kind, headers=HEADERS)
