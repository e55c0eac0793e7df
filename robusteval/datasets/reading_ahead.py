"""Threads that decode the images which are asked for next, while something else is computed.

They only ever save time. What a thread cannot decode, for whatever reason, is forgotten, and who
asks for the image decodes it: so errors are those of reading without threads, at the same image.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from robusteval.datasets.images import begin_reading_aside

THREADS = 8  # at most; a GPU takes about 5,000 photos a second in, a thread decodes some 500
Found = tuple[np.ndarray, int]  # an image and its id


class ReadAhead:
    """Decodes images before they are asked for, never more than there is room for.

    Parameters
    ----------
    read : callable
        Decodes the image at a position, in any thread.
    most : int
        Images that are held, or under way, at any moment.
    """

    def __init__(self, read: Callable[[int], Found], most: int) -> None:
        self.read = read
        self.most = most
        self.coming: Iterator[int] = iter(())
        self.under_way: dict[int, Future[Found]] = {}
        self.pool: ThreadPoolExecutor | None = None

    @contextmanager
    def start_threads(self) -> Iterator[None]:
        """Have threads inside; outside nothing is read ahead."""
        threads = min(THREADS, count_cores())
        # threads never change filters, so what Pillow remarks there is filtered out here
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            self.pool = ThreadPoolExecutor(
                threads, "robusteval-reader", initializer=begin_reading_aside
            )
            try:
                yield
            finally:
                self.forget()
                pool, self.pool = self.pool, None
                pool.shutdown(cancel_futures=True)

    def expect(self, positions: Sequence[int]) -> None:
        """These are asked for next, in this order, and nothing else that was expected before."""
        self.forget()
        self.coming = iter(positions)
        self._begin()

    def forget(self) -> None:
        """Expect nothing any more."""
        self.coming = iter(())
        for future in self.under_way.values():
            future.cancel()
        self.under_way.clear()

    def take(self, position: int) -> Found | None:
        """An image and its id; None if the caller has to read it, and be told what is wrong."""
        future = self.under_way.pop(position, None)
        found = None
        if future is not None and not future.cancel():  # rather read it than wait for its turn
            try:
                found = future.result()
            except Exception:
                found = None
        self._begin()
        return found

    def _begin(self) -> None:
        """Have as many under way as there is room for."""
        while self.pool is not None and len(self.under_way) < self.most:
            position = next(self.coming, None)
            if position is None:
                return
            if position not in self.under_way:
                self.under_way[position] = self.pool.submit(self.read, position)


def count_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
