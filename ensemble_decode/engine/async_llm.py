"""``AsyncLLM``: requests that come and go while others run. The engine loops in one background thread."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ensemble_decode.engine.engine import Engine, Prompt
from ensemble_decode.engine.llm import LLM
from ensemble_decode.engine.outputs import RequestOutput
from ensemble_decode.engine.params import SamplingParams


class EngineDeadError(RuntimeError):
    """The engine's loop has ended, by :meth:`AsyncLLM.shutdown` or by the error in ``__cause__``."""


class QueueFullError(RuntimeError):
    """More requests are waiting than ``max_waiting`` allows; try again later."""


@dataclass(slots=True, eq=False)
class _Client:
    """Where a request's outputs go. Only the newest matters, since outputs are cumulative: nothing can pile up."""

    loop: asyncio.AbstractEventLoop
    ready: asyncio.Event
    newest: RequestOutput | Exception | None = None
    request_id: str | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        self.newest = item
        with suppress(RuntimeError):  # the client's event loop is closed: nobody waits for this
            self.loop.call_soon_threadsafe(self.ready.set)


class AsyncLLM:
    """An :class:`LLM` for servers.

    Parameters
    ----------
    model, pairs, **options
        As :class:`LLM`; or an ``LLM`` (or :class:`Engine`) that is loaded already.
    max_waiting : int
        Requests that may wait for their turn; one more raises :class:`QueueFullError`.
    """

    def __init__(self, model: str | LLM | Engine, *args: Any, max_waiting: int = 1024, **options: Any) -> None:
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 1:
            raise ValueError(f"max_waiting is {max_waiting!r}, allowed is 1 or more")
        if not isinstance(model, LLM | Engine):
            model = LLM(model, *args, **options)
        elif args or options:
            names = [*(f"argument {i}" for i in range(2, 2 + len(args))), *options]
            raise ValueError(f"{', '.join(names)}: given with a model that is loaded already, allowed is max_waiting")
        self.engine: Engine = model.engine if isinstance(model, LLM) else model
        self.max_waiting = max_waiting
        self._lock = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()  # what the loop's thread does before its next step
        self._clients: dict[str, _Client] = {}
        self._closing = False  # no new requests
        self._ended = False  # no more steps
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request, each with all the text so far; the last has ``finished``.

        A consumer that is slower than the engine skips intermediate outputs and loses nothing. One that leaves (is
        cancelled, or closes the iterator) aborts its request.

        Raises
        ------
        ValueError
            The request can't be served.
        QueueFullError, EngineDeadError
        """
        client = _Client(asyncio.get_running_loop(), asyncio.Event())
        added: asyncio.Future[str] = client.loop.create_future()
        self._call(lambda: self._add(client, added, prompt, params, request_id))
        try:
            await added
        except asyncio.CancelledError:
            self._leave_soon(client)
            raise
        finished = False
        try:
            while not finished:
                await client.ready.wait()
                client.ready.clear()
                item = client.newest
                if isinstance(item, Exception):
                    finished = True
                    raise item
                assert item is not None
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._leave_soon(client)

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gets a last output with finish reason "abort". Unknown ids are ignored."""
        self.abort_soon(request_id)

    def abort_soon(self, request_id: str) -> None:
        """:meth:`abort`, from any thread."""
        with suppress(EngineDeadError):  # the request went down with the engine
            self._call(lambda: self._abort(request_id), while_closing=True)

    def shutdown(self, drain: bool = False, timeout: float | None = None) -> None:
        """End the loop: at once, or (``drain``) when every accepted request is done."""
        with self._lock:
            self._closing = True
            if not drain:
                self._calls.append(self._abort_all)
            self._lock.notify()
        self._thread.join(timeout)

    # ── the loop's thread ───────────────────────────────────────────────────────────────────────────────────────────
    def _call(self, function: Callable[[], None], while_closing: bool = False) -> None:
        with self._lock:
            if self._ended or (self._closing and not while_closing):
                raise self._dead()
            self._calls.append(function)
            self._lock.notify()

    def _dead(self) -> EngineDeadError:
        error = EngineDeadError(
            "the engine has been shut down" if self._error is None else f"the engine has failed: {self._error!r}"
        )
        error.__cause__ = self._error
        return error

    def _loop(self) -> None:
        calls: deque[Callable[[], None]] = deque()
        try:
            while True:
                with self._lock:
                    while not self._calls and not self.engine.has_work and not self._closing:
                        self._lock.wait()
                    calls, self._calls = self._calls, deque()
                    ending = self._closing
                while calls:
                    calls.popleft()()
                if ending and not self.engine.has_work:
                    return
                for output in self.engine.step():
                    self._deliver(output)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._error = error
        finally:
            with self._lock:
                self._closing = self._ended = True
                calls += self._calls
                self._calls.clear()
            for client in self._clients.values():
                client.put(self._dead())
            self._clients.clear()
            for call in calls:
                with suppress(Exception):  # the others are answered all the same
                    call()

    def _add(
        self,
        client: _Client,
        added: asyncio.Future[str],
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
    ) -> None:
        def answer(result: str | Exception) -> None:
            if added.cancelled():
                return
            if isinstance(result, Exception):
                added.set_exception(result)
            else:
                added.set_result(result)

        result: str | Exception
        try:
            if self._ended:
                raise self._dead()
            # Samples and preempted sequences that wait for a place have tokens already: their requests had their turn.
            if sum(not sequence.output for sequence in self.engine.scheduler.waiting) >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests are waiting, no more are taken")
            request = self.engine.add_request(prompt, params, request_id)
            self._clients[request.request_id] = client
            result = client.request_id = request.request_id
        except Exception as error:
            result = error
        try:
            client.loop.call_soon_threadsafe(answer, result)
        except RuntimeError:  # the client's event loop is closed
            if isinstance(result, str):
                self._abort(result)

    def _leave_soon(self, client: _Client) -> None:
        """Abort a client's request, and not that of another one who has its id by now."""

        def leave() -> None:
            if client.request_id is not None and self._clients.get(client.request_id) is client:
                self._abort(client.request_id)

        with suppress(EngineDeadError):
            self._call(leave, while_closing=True)

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._deliver(output)

    def _abort_all(self) -> None:
        for request_id in list(self.engine.requests):
            self._abort(request_id)

    def _deliver(self, output: RequestOutput) -> None:
        client = self._clients.get(output.request_id)
        if client is None:
            return
        if output.finished:
            del self._clients[output.request_id]
        client.put(output)
