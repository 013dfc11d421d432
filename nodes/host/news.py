"""Events to the pages that show this ComfyUI, sent no oftener than anyone can read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from server import PromptServer

INTERVAL = 0.25
"""Seconds between two events at least."""


class News:
    """Events of one kind. What is told less than INTERVAL after the last one waits, and goes out in one with the rest.

    `make` gives what to send when it is sent, from any thread, while `lock` (an RLock) is held.
    """

    def __init__(self, event: str, make: Callable[[], dict], lock: threading.RLock) -> None:
        self._event, self._make, self._lock = event, make, lock
        self._sent_at = 0.0
        self._timer: threading.Timer | None = None

    def tell(self) -> None:
        """There is something new: send it now, or as soon as may be."""
        with self._lock:
            if self._timer is not None:
                return
            wait = self._sent_at + INTERVAL - time.monotonic()
            if wait <= 0:
                self._send()
            else:
                self._timer = threading.Timer(wait, self._send)
                self._timer.daemon = True
                self._timer.start()

    def _send(self) -> None:
        server = getattr(PromptServer, "instance", None)
        with self._lock:
            self._timer = None
            self._sent_at = time.monotonic()
            event = self._make()
            if server is not None:
                server.send_sync(self._event, event)
