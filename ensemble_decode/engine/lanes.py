"""Lanes: where a model group's forward runs. On a CPU a lane is a worker thread with operator threads of its own.

Two placements are known: *sequential*, every group after the other in the caller's thread with all cores, and
*lanes*, one worker thread a group with its share of the cores. Which wins depends on the models and the machine, so
``Runner`` measures both at start-up. (A CUDA lane is a stream; it will stand here beside the worker thread.)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Literal, TypeVar

import torch

from ensemble_decode import ops

Placement = Literal["auto", "sequential", "lanes"]
PLACEMENTS: tuple[Placement, ...] = ("auto", "sequential", "lanes")
T = TypeVar("T")


class Lane:
    """A worker thread that runs what it is given, one after another, with ``threads`` operator threads."""

    def __init__(self, name: str, threads: int) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], object], Future] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, args=(threads,), name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._queue.put((function, future))
        return future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self, threads: int) -> None:
        ops.set_num_threads(threads)
        torch.set_num_threads(1)  # see Runner.execute
        while (item := self._queue.get()) is not None:
            function, future = item
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


class Lanes:
    """Runs one function per group, by the chosen placement."""

    def __init__(self, groups: int, placement: Literal["sequential", "lanes"]) -> None:
        self.placement = placement
        share = max(1, ops.num_threads() // groups)
        self._lanes = [Lane(f"lane-{i}", share) for i in range(groups)] if placement == "lanes" else []

    def run(self, functions: list[Callable[[], T] | None]) -> list[T | None]:
        """Results in order; None stays None (the group has nothing to do in this step)."""
        if not self._lanes or sum(f is not None for f in functions) < 2:
            return [None if f is None else f() for f in functions]
        futures = [None if f is None else lane.submit(f) for lane, f in zip(self._lanes, functions, strict=True)]
        # Wait for all before raising: no lane may still write into a cache when the caller goes on.
        running = [future for future in futures if future is not None]
        try:
            errors = [future.exception() for future in running]
        except KeyboardInterrupt:
            wait(running)
            raise
        if error := next((e for e in errors if e is not None), None):
            raise error
        return [None if future is None else future.result() for future in futures]

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes = []
