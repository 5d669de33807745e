"""Dropout on a CPU from 16 random bits an element, where torch draws 32 for each, one after the other.

Drawing is a tenth of the fine-tuning of a BERT in float32, and a quarter in bfloat16. What is dropped depends on the
seed alone, as before; the share that is kept is rounded to 2^-16.
"""

import functools
import warnings

import torch
from torch import Tensor

BITS = 16


@functools.cache  # which keeps the library, and with it what it registered
def quicken() -> torch.library.Library:
    """From here on, every Bernoulli mask that torch fills on the CPU in this process is drawn so. Once is enough."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that an operation of torch is replaced, which is the point
        warnings.simplefilter("ignore")
        library.impl("bernoulli_.float", bernoulli_, "CPU")
    return library


def bernoulli_(self: Tensor, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Fills a tensor with ones, each with probability p, and zeros. Raises `ValueError` where p is no probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"bernoulli_: p is {p}; from 0 to 1 would be right")
    below = round(p * 2**BITS) - 2 ** (BITS - 1)
    if below == 2 ** (BITS - 1):  # no number of 16 bits, and above them all
        return self.fill_(1)
    count = self.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return torch.lt(drawn.view(torch.int16)[:count].view(self.shape), below, out=self)
