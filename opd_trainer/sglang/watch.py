"""Whether a server of ours still answers: one that lives and says nothing is ended, so that it can be started anew."""

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

QUESTION = "/model_info"
"""Costs the server nothing, and is answered while it is paused, asleep or busy. A scheduler that hangs behind a server
that answers is ended by SGLang's own watchdog."""
ANSWER_S = 30.0
"""Limit on one answer."""


class Watch:
    """Asks a server from a thread of its own, since the trainer's event loop may stand still during an update.

    Args:
        url: of the server.
        silent_s: how long it may not answer.
        hung: is called, once, when it has not.
    """

    def __init__(self, url: str, silent_s: float, hung: Callable[[], None]) -> None:
        self._url, self._silent_s, self._hung = url, silent_s, hung
        # Past any proxy that the environment names, as the client goes.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name=f"watch {url}", daemon=True).start()

    def end(self) -> None:
        """Stops asking; does not wait for the answer to the last question."""
        self._ended.set()

    def _watch(self) -> None:
        pause, heard = self._silent_s / 10, time.monotonic()
        while not self._ended.wait(pause):
            if self._answers():
                heard = time.monotonic()
            elif time.monotonic() - heard > self._silent_s and not self._ended.is_set():
                self._hung()
                return

    def _answers(self) -> bool:
        try:
            with self._opener.open(self._url + QUESTION, timeout=min(ANSWER_S, self._silent_s)):
                return True
        except urllib.error.HTTPError:
            # It would rather not, but it speaks.
            return True
        except OSError:
            return False
