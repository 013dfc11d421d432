"""A captioner behind an OpenAI-compatible server: GPT, Claude, Gemini, Ollama, LM Studio, vLLM, llama.cpp."""

import base64
import io
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException

from PIL import Image

from .asking import LONGEST_CAPTION_TOKENS, shrunk
from .captioner import Answer, CaptioningStopped
from .server_address import CHAT, parse_address, read_key

log = logging.getLogger(__name__)
TRIES = 5
LONGEST_WAIT = 60.0
GIVEN_UP_IN_A_ROW = 3
"""A server that fails for so many pictures, one after the other, is not asked about the rest."""
REFUSED_FOR_GOOD = {
    401: "it does not accept the key",
    402: "it asks for payment",
    403: "it does not allow this",
    404: "it has no such model or address",
}
LONGEST_REPLY = 2**20


class ServerCaptioner:
    """Sends each picture to ``address`` and answers with what ``model`` says there.

    ``key_variable`` names the environment variable with the key ("" for a server without one). ``wait`` is slept with
    between tries, and may raise to cancel. Raises ValueError for an address or a key that cannot be used.
    """

    batch_size = 1
    writes_tags = False
    follows_instructions = True

    def __init__(
        self,
        address: str,
        model: str,
        key_variable: str = "",
        timeout: float = 120.0,
        *,
        wait: Callable[[float], None] = time.sleep,
    ):
        if not model.strip():
            raise ValueError("No model is named for the captioning server: give one that it has, such as qwen3-vl.")
        self._address = parse_address(address)
        self._key = read_key(self._address, key_variable)
        self._model, self._timeout, self._wait = model.strip(), timeout, wait
        self._optional = {"temperature": 0, "max_tokens": LONGEST_CAPTION_TOKENS}
        self._given_up = 0
        self._announced = False
        self._opener = urllib.request.build_opener(*_handlers(self._address.is_nearby))

    @property
    def notice(self) -> str:
        """What the user must know before the first picture is sent; "" when pictures stay in the local network."""
        return self._address.notice

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        if self.notice and not self._announced:
            log.warning(self.notice)
        self._announced = True
        return [self._ask(image, instruction) for image in images]

    def close(self) -> None:
        """It holds nothing: the model is the server's."""

    def _ask(self, image: Image.Image, instruction: str) -> Answer:
        try:
            reply = self._reply(_message(image, instruction))
        except _NoReply as error:
            self._given_up += 1
            if self._given_up >= GIVEN_UP_IN_A_ROW:
                raise CaptioningStopped(f"{error}, for {self._given_up} pictures in a row") from None
            return Answer(error=str(error))
        except ValueError as error:
            self._given_up = 0
            return Answer(error=str(error))
        self._given_up = 0
        return answer_in(reply)

    def _reply(self, message: dict) -> object:
        """What the server replies, asked again while its trouble is a passing one."""
        trouble, tries = "", 0
        while tries < TRIES:
            try:
                with self._opener.open(self._request(message), timeout=self._timeout) as response:
                    return _json(self._masked(response.read(LONGEST_REPLY).decode("utf-8", errors="replace")))
            except urllib.error.HTTPError as error:
                with error:
                    said = _error_in(self._masked(error.read(LONGEST_REPLY).decode("utf-8", errors="replace")))
                if error.code == 400 and self._drop_what_it_does_not_know(said):
                    continue
                trouble, delay = self._passing(error, said), _retry_after(error.headers.get("Retry-After"))
            except (OSError, HTTPException) as error:
                trouble, delay = f"it cannot be reached ({_short(self._masked(_reason(error)))})", None
            tries += 1
            if tries < TRIES:
                self._wait(2.0 ** (tries - 1) if delay is None else delay)
        raise _NoReply(f"the server {self._address.host} gave no answer in {TRIES} tries: {trouble}")

    def _request(self, message: dict) -> urllib.request.Request:
        body = json.dumps({"model": self._model, "messages": [message], **self._optional}).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "lora-workbench"}
        request = urllib.request.Request(self._address.url + CHAT, body, headers, method="POST")
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        return request

    def _drop_what_it_does_not_know(self, said: str) -> bool:
        """Leave out a setting that the server complains about, from now on; some models take none."""
        unknown = [name for name in self._optional if name in said]
        for name in unknown:
            del self._optional[name]
        return bool(unknown)

    def _passing(self, error: urllib.error.HTTPError, said: str) -> str:
        """What is wrong when trying again may help; otherwise raises: CaptioningStopped if every picture would fail."""
        detail = f" ({said})" if said else ""
        if error.code in (408, 409, 429) or error.code >= 500:
            return f"HTTP {error.code}{detail}"
        if 300 <= error.code < 400:
            raise CaptioningStopped(
                f"The server {self._address.host} sends on to another address, which is not followed: "
                "give the address that it means."
            )
        if why := REFUSED_FOR_GOOD.get(error.code):
            raise CaptioningStopped(f"The server {self._address.host} refused: {why}, HTTP {error.code}{detail}.")
        raise ValueError(f"the server refused this picture: HTTP {error.code}{detail}")

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _NoReply(Exception):
    """The server could not be had to answer about one picture."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: neither the key nor a picture goes anywhere but to the address that was given."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _handlers(nearby: bool) -> list[urllib.request.BaseHandler]:
    """A server in the local network is asked directly, past any proxy for the internet."""
    return [_NoRedirect(), urllib.request.ProxyHandler({})] if nearby else [_NoRedirect()]


def _message(image: Image.Image, instruction: str) -> dict:
    """The picture as a JPEG and the instruction, in the form of the chat completions API."""
    jpeg = io.BytesIO()
    shrunk(image).save(jpeg, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": instruction}]
    return {"role": "user", "content": parts}


def answer_in(reply: object) -> Answer:
    """The answer in a reply of the chat completions API, or why there is none."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text, refusal = _text(message.get("content")), _text(message.get("refusal"))
    except (KeyError, IndexError, TypeError, AttributeError):
        said = _error_in(json.dumps(reply))
        return Answer(error=f"the server's reply holds no answer{f' ({said})' if said else ''}")
    if refusal or choice.get("finish_reason") == "content_filter":
        return Answer(error=f"the model refused: {_short(refusal or text) or 'its filter stopped the answer'}")
    return Answer(text) if text else Answer(error="the model's answer is empty")


def _text(content: object) -> str:
    """The text of a message, which is a string or a list of parts; "" for anything else."""
    if isinstance(content, list):
        content = " ".join(part["text"] for part in content if isinstance(part, dict) and "text" in part)
    return content.strip() if isinstance(content, str) else ""


def _error_in(reply: str) -> str:
    """What an error reply says, in one short line."""
    try:
        error = json.loads(reply)
        error = error.get("error", error)
        text = error.get("message", "") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = reply
    return _short(str(text))


def _json(reply: str) -> object:
    try:
        return json.loads(reply)
    except ValueError:
        raise ValueError(f"the server's reply is not JSON: {_short(reply)}") from None


def _short(text: str) -> str:
    return " ".join(text.split())[:160]


def _reason(error: BaseException) -> str:
    error = getattr(error, "reason", None) or error
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__


def _retry_after(value: str | None) -> float | None:
    """The seconds a ``Retry-After`` header asks for, a number or a date, at most LONGEST_WAIT; None without one."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT)
