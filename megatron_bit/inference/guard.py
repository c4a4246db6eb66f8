"""Whom `serve` answers: requests for a host that it is, from no page of somebody else, with a body of JSON.

A browser on the same machine reaches a server on loopback, and a page of any origin may make it send requests there:
with a Host of the page's own if its name was made to point here (DNS rebinding), with an Origin otherwise, and without
asking first if the body is of a form's content types. docs/security.md says what is answered.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_bit.errors import UserError
from megatron_bit.inference.completion import Refused, brief

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(:[0-9]*)?", re.ASCII)  # host and port
_FORM = "application/x-www-form-urlencoded"
_BROWSER = ("origin", "referer", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")


class Guard:
    """ASGI middleware. `hosts` are allowed beside the names of loopback; None allows every Host."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope))
            except Refused as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if self._hosts is not None and not (len(hosts) == 1 and self._is_ours(hosts[0])):
            raise Refused(403, f"Host {brief(', '.join(hosts))} is not served here; --allow-host NAME allows another")
        origins = headers.getlist("origin")
        for origin in origins:
            scheme, _, authority = origin.partition("://")
            if scheme not in ("http", "https") or not self._is_ours(authority):
                raise Refused(403, f"Origin {brief(origin)} is refused; --allow-host NAME allows pages of another host")
        if not origins and headers.get("sec-fetch-site") == "cross-site":
            raise Refused(403, "a request from a page of another site is refused")

    def _is_ours(self, authority: str) -> bool:
        match = _AUTHORITY.fullmatch(authority)
        if match is None:
            return False
        host = plain_host(match[1])
        return is_loopback(host) or host in (self._hosts or ())


def check_content_type(headers: Headers) -> None:
    """Refused unless the body is said to be JSON. `curl -d` says that it is a form, or a client says nothing: taken if
    nothing else speaks of a browser, because a page cannot leave all of that out."""
    given = headers.getlist("content-type")
    kind = ", ".join(given).partition(";")[0].strip().lower()
    if kind == "application/json" or (kind in ("", _FORM) and not any(name in headers for name in _BROWSER)):
        return
    raise Refused(415, f"Content-Type {brief(kind)} is refused; add -H 'Content-Type: application/json'")


def plain_host(host: str) -> str:
    """A host as it is compared: small letters, no brackets, no dot at the end."""
    return host.lower().strip("[]").removesuffix(".")


def is_loopback(host: str) -> bool:
    """Whether this is a name or address of loopback: localhost, 127.0.0.0/8, ::1."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def allowed_hosts(given: Iterable[str]) -> frozenset[str]:
    """What --allow-host says. UserError for what is no bare host name or address."""
    for name in given:
        try:
            ipaddress.IPv6Address(name.strip("[]"))
        except ValueError:
            match = _AUTHORITY.fullmatch(name)
            if match is None or match[2] is not None or "*" in name or not name.isprintable():
                raise UserError(
                    f"--allow-host {name!r} is no host; give a name or an address, without http:// and port"
                ) from None
    return frozenset(map(plain_host, given))
