"""Lanes: where a model group's forward runs. On a CPU a lane is a worker thread with operator threads of its own, on CUDA a stream.

Two placements are known: *sequential*, every group after the other in the caller's thread with all cores, and
*lanes*, one worker thread a group with its share of the cores, or one stream. Which wins depends on the models and the
machine, so ``Runner`` measures both at start-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Literal, TypeVar
from weakref import finalize

import torch

from ensemble_decode import ops
from ensemble_decode.engine.device import StreamDevice
from ensemble_decode.engine.plan import Forward, Operation, Record, Wait, fork_join, streams_of

Placement = Literal["auto", "sequential", "lanes"]
PLACEMENTS: tuple[Placement, ...] = ("auto", "sequential", "lanes")
T = TypeVar("T")


class Lane:
    """A worker thread that runs what it is given, one after another, with ``threads`` operator threads."""

    def __init__(self, name: str, threads: int) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], object], Future] | None] = SimpleQueue()
        self._thread = Thread(target=_work, args=(self._queue, threads), name=name, daemon=True)
        self._thread.start()
        self._end = finalize(self, self._queue.put, None)  # the thread holds the queue alone, and goes with its lane

    def submit(self, function: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._queue.put((function, future))
        return future

    def close(self) -> None:
        self._end()
        self._thread.join()


def _work(queue: SimpleQueue[tuple[Callable[[], object], Future] | None], threads: int) -> None:
    """What a lane's thread does."""
    ops.set_num_threads(threads)
    torch.set_num_threads(1)  # see Runner.execute
    while (item := queue.get()) is not None:
        function, future = item
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del item, function, future  # or a waiting thread would keep a model that nobody has any more


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


class StreamLanes:
    """Runs one function per group on a device's streams: issues, and waits for nothing.

    Parameters
    ----------
    device : StreamDevice
    groups : int
    main_group : int
        The target's: it stays on the main stream, which the others fork from and are joined to.
    placement : {"sequential", "lanes"}
    """

    def __init__(
        self, device: StreamDevice, groups: int, main_group: int, placement: Literal["sequential", "lanes"]
    ) -> None:
        self.placement = placement
        self.streams = streams_of(groups, main_group, placement == "lanes")
        self._device = device
        self._events = {name: device.event() for name in ("fork", *(f"join {s}" for s in range(1, groups)))}

    def run(self, functions: list[Callable[[], T] | None]) -> list[T | None]:
        """Results in order, valid on the main stream; None stays None."""
        present = [group for group, function in enumerate(functions) if function is not None]
        return self.carry_out(fork_join(present, self.streams), functions)

    def carry_out(self, operations: Sequence[Operation], functions: Sequence[Callable[[], T] | None]) -> list[T | None]:
        """Issue planned ``operations``, the forwards being ``functions`` by group."""
        results: list[T | None] = [None] * len(functions)
        error: BaseException | None = None
        for operation in operations:
            if isinstance(operation, Record):
                self._device.record(self._events[operation.event], operation.stream)
            elif isinstance(operation, Wait):
                self._device.wait(operation.stream, self._events[operation.event])
            elif isinstance(operation, Forward) and error is None:
                function = functions[operation.group]
                assert function is not None
                try:
                    with self._device.on(operation.stream):
                        results[operation.group] = function()
                except BaseException as raised:  # every fork is joined first: nobody may still write into a cache
                    error = raised
        if error is not None:
            raise error
        return results

    def close(self) -> None:
        """Streams need no closing."""
