"""Something looked at every so often, in a thread, while other work goes on."""

import threading
from types import TracebackType
from typing import Self


class Watch:
    """Calls `look` every `every_s` seconds while it is open, and once more at its end."""

    every_s: float

    def look(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _run(self) -> None:
        self.look()
        while not self._over.wait(self.every_s):
            self.look()
