"""The peak of memory while something runs on this machine."""

from typing import Self

import psutil

from jobs.watch import Watch


class Peak(Watch):
    """Most memory in use on the whole machine, over what was in use at the start of the process tree, in MiB.

    Counted for the machine, because Ray's workers share pages and a sum over processes counts those many times.
    """

    every_s = 0.5
    _idle: int | None = None

    def __enter__(self) -> Self:
        if Peak._idle is None:
            Peak._idle = psutil.virtual_memory().used
        self.mib = 0
        return super().__enter__()

    def look(self) -> None:
        used = psutil.virtual_memory().used - (Peak._idle or 0)
        self.mib = max(self.mib, used // 2**20)
