"""Where requests go: an address, a model, and the name of the variable that holds the key.

Owns what may stand in an address, how a key becomes a header, and that neither key nor password is ever shown. A key
is read from the environment when it is sent, and kept nowhere.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from deepalign.errors import UserError

KEY_ENV = "OPENAI_API_KEY"
BASE_URL_ENV = "OPENAI_BASE_URL"
_VERSION = re.compile(r"/v\d+[a-z0-9]*$")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HIDDEN = "[key]"
_LEAST_HIDDEN = 4
_LEAST_HIDDEN_IN_ANSWERS = 16
"""A short key such as "EMPTY", as local servers take, may well be a word of an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """One OpenAI-compatible server; several with the same model share the work."""

    url: str
    """Base address, such as "http://127.0.0.1:8080/v1"; where /v1 is missing it is looked for."""
    model: str = ""
    """Name of the model there; "" takes the one that the server lists."""
    key_env: str = KEY_ENV
    """Name of the environment variable that holds the key; the key itself is never kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked(self.url))
        if self.key_env and not _ENV_NAME.fullmatch(self.key_env):
            # The value is not repeated: it may be a key that was given by mistake.
            raise UserError("key_env is no name of an environment variable; give the name, not the key itself")

    @property
    def versioned(self) -> bool:
        """Whether the address ends with a version, as /v1."""
        return _VERSION.search(self.url) is not None

    @property
    def loopback(self) -> bool:
        """Whether the server is this machine, to which no proxy leads."""
        host = urlsplit(self.url).hostname or ""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")
        return address.is_loopback or address.is_unspecified

    def address(self, path: str) -> str:
        """Full address of a path; one that begins with "/" stands beside the version, as vLLM's /tokenize."""
        return _VERSION.sub("", self.url) + path if path.startswith("/") else f"{self.url}/{path}"

    def headers(self) -> dict[str, str]:
        """What to send with each request; a key beginning with "Basic " is sent as it is."""
        key = self._key()
        if not key:
            return {}
        if not key.isascii() or not key.isprintable():
            raise UserError(f"the key in {self.key_env} holds characters that no header can; set it again")
        return {"Authorization": key if key.startswith(("Basic ", "Bearer ")) else f"Bearer {key}"}

    def why_refused(self) -> str:
        """What to tell of an answer 401; what the server says is left out, for some repeat the key."""
        if self._key():
            return f"HTTP 401: {self.url} does not take the key in {self.key_env}; set that variable anew"
        return f"HTTP 401: {self.url} wants a key, and {self.key_env or 'no variable'} is not set"

    def hide(self, text: str, *, answer: bool = False) -> str:
        """The text without the key.

        Args:
            text: What a server or a library said.
            answer: Whether it is a model's answer, in which a short key may be a word.
        """
        key = self._key()
        for secret in (key, key.partition(" ")[2]):
            if len(secret) >= (_LEAST_HIDDEN_IN_ANSWERS if answer else _LEAST_HIDDEN):
                text = text.replace(secret, _HIDDEN)
        return text

    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip() if self.key_env else ""


def _checked(url: str) -> str:
    """The address without a slash at its end; one that holds a secret is refused without repeating it."""
    url = url.strip()
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        port_is_fine = False
    if not port_is_fine:
        raise UserError("the server's address cannot be read; give one such as http://127.0.0.1:8080/v1")
    if "@" in parts.netloc:
        remedy = f'set {KEY_ENV} to "Basic ..." instead'
        raise UserError(f"the address of {parts.hostname} holds a user or a password, which would be kept; {remedy}")
    if parts.query or parts.fragment:
        raise UserError(f"the address of {parts.hostname} has a part behind its path (? or #); give it without")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8080/v1")
    return parts.geturl().rstrip("/").removesuffix("/chat/completions").removesuffix("/completions").rstrip("/")
