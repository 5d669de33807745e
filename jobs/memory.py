"""The peak of memory while something runs on this machine."""

import threading
from types import TracebackType
from typing import Self

import psutil

EVERY_S = 0.5


class Peak:
    """Most memory in use on the whole machine, over what was in use at the start of the process tree, in MiB.

    Counted for the machine, because Ray's workers share pages and a sum over processes counts those many times.
    """

    _idle: int | None = None

    def __enter__(self) -> Self:
        if Peak._idle is None:
            Peak._idle = psutil.virtual_memory().used
        self.mib = 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while True:
            used = psutil.virtual_memory().used - (Peak._idle or 0)
            self.mib = max(self.mib, used // 2**20)
            if self._over.wait(EVERY_S):
                return
