"""Where a captioning server is, and whether it may be given a key."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

KEY_HOSTS = {
    "OPENAI_API_KEY": ("api.openai.com",),
    "ANTHROPIC_API_KEY": ("api.anthropic.com",),
    "GEMINI_API_KEY": ("generativelanguage.googleapis.com",),
    "GOOGLE_API_KEY": ("generativelanguage.googleapis.com",),
    "MISTRAL_API_KEY": ("api.mistral.ai",),
    "OPENROUTER_API_KEY": ("openrouter.ai",),
    "GROQ_API_KEY": ("api.groq.com",),
    "XAI_API_KEY": ("api.x.ai",),
}
"""The variables that services tell people to set, and the only hosts that are given what is in them."""
OWN_KEY_PREFIX = "CAPTION_"
"""A variable named so holds a key meant for captioning and goes to any host: a workflow reaches no other secret."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+(?:%[a-z0-9._-]+)?")
"""A name or a number, in which no other letter passes for a full stop; names in other letters are written xn--."""
LOCAL_ENDINGS = (".localhost", ".local", ".lan", ".internal", ".home.arpa")
CHAT = "/chat/completions"


@dataclass(frozen=True)
class ServerAddress:
    """An OpenAI-compatible server: ``url`` goes up to the version (``http://localhost:11434/v1``)."""

    url: str
    host: str
    encrypted: bool

    @property
    def is_this_machine(self) -> bool:
        """Whether what is sent stays on this machine."""
        ip = _ip(self.host)
        return ip.is_loopback if ip else self.host == "localhost" or self.host.endswith(".localhost")

    @property
    def is_nearby(self) -> bool:
        """Whether what is sent stays on this machine or in the local network, as far as the name tells."""
        ip = _ip(self.host)
        if ip:
            return (ip.is_private or ip.is_loopback or ip.is_link_local) and not ip.is_unspecified
        return "." not in self.host or self.host.endswith(LOCAL_ENDINGS)

    @property
    def notice(self) -> str:
        """What the user must know before the first picture is sent; "" when pictures stay in the local network."""
        return "" if self.is_nearby else f"The pictures leave this machine: each one is sent to {self.host}."


def parse_address(text: str) -> ServerAddress:
    """The address a user typed, with or without ``/v1`` and ``/chat/completions``; ValueError when it is none."""
    typed = text.strip().rstrip("/")
    try:
        parts = urlsplit(typed)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "The server address holds a password or a query, which would be saved in the workflow: give only "
            "http(s)://host:port/path, and the key in an environment variable."
        )
    if parts.scheme not in ("http", "https") or not HOST.fullmatch(host):
        raise ValueError(f"'{typed}' is not a server address. Give one such as http://localhost:11434/v1.")
    place = f"[{host}]" if ":" in host else host
    path = parts.path.removesuffix(CHAT) or "/v1"
    url = f"{parts.scheme}://{place}{f':{port}' if port else ''}{path}"
    return ServerAddress(url, host, parts.scheme == "https")


def read_key(address: ServerAddress, variable: str, environment: Mapping[str, str] = os.environ) -> str:
    """The key in the environment variable of that name; "" when ``variable`` is empty.

    Raises ValueError, never with the key in it, when there is none or the server may not have it.
    """
    variable = variable.strip()
    if not variable:
        return ""
    known = variable in KEY_HOSTS or variable.startswith(OWN_KEY_PREFIX)
    # What is no name of a variable that we know may be a key typed into the wrong place: it is not repeated.
    shown = f"the environment variable {variable}" if known else "the environment variable named for the key"
    if not VARIABLE.fullmatch(variable):
        raise ValueError(
            "The key belongs in an environment variable and only the variable's name here, such as OPENAI_API_KEY: "
            "what is typed here is saved in the workflow and in pictures."
        )
    if not address.is_this_machine and not _may_have(address.host, variable):
        raise ValueError(
            f"The server {address.host} may not be given what is in {shown}: put a key for it in an environment "
            f"variable whose name starts with {OWN_KEY_PREFIX}, such as {OWN_KEY_PREFIX}API_KEY."
        )
    if not address.encrypted and not address.is_nearby:
        raise ValueError(f"A key would travel to {address.host} unencrypted: use an address that starts with https://.")
    key = environment.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"There is no key in {shown}: set it before ComfyUI starts, or leave the name empty for a server without."
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"What is in {shown} cannot be a key: it holds line breaks or letters outside ASCII.")
    return key


def _may_have(host: str, variable: str) -> bool:
    return variable.startswith(OWN_KEY_PREFIX) or host in KEY_HOSTS.get(variable, ())


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The number that a host stands for, also one as programs read it: ``2130706433`` is ``127.0.0.1``."""
    try:
        number = ipaddress.ip_address(host)
        return getattr(number, "ipv4_mapped", None) or number
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_aton(host))
    except OSError:
        return None
