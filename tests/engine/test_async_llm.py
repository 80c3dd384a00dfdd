"""``AsyncLLM``: clients that come, read slowly, leave and fail, while others run."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from ensemble_decode.engine.async_llm import AsyncLLM, EngineDeadError, QueueFullError
from ensemble_decode.engine.params import SamplingParams

from .fake import PieceTokenizer, assert_no_leak, expected, make_engine


def ids(text: str) -> list[int]:
    return PieceTokenizer()(text).input_ids


def params(max_tokens: int = 10, **others) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "seed": 0, "ignore_eos": True, "alpha": 0, **others})


class Gate:
    """Lets a runner's steps through one by one, or all."""

    def __init__(self, engine) -> None:
        self.steps = threading.Semaphore(0)
        self.open = threading.Event()
        execute = engine.runner.execute

        def gated(batch):
            while not self.open.is_set() and not self.steps.acquire(timeout=0.01):
                pass
            time.sleep(0.0005)  # the time of a small forward: the event loop's thread has its turns
            return execute(batch)

        engine.runner.execute = gated

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.release()


@pytest.fixture
def served():
    llm = AsyncLLM(make_engine())
    yield llm
    llm.shutdown(timeout=10)
    assert not llm._thread.is_alive()


def run(coroutine) -> object:
    """Never longer than 20 seconds: what hangs is a failure, not a stuck suite."""
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def last(stream):
    return [output async for output in stream][-1]


def idle(llm: AsyncLLM) -> None:
    """Wait until the engine has nothing to do, and see that nothing is held."""
    deadline = time.monotonic() + 10
    while llm.engine.requests or llm._calls:
        assert time.monotonic() < deadline, "requests stay"
        time.sleep(0.005)
    assert_no_leak(llm.engine)
    assert not llm._clients


def test_outputs_are_cumulative_and_the_last_is_finished(served):
    async def client():
        return [output async for output in served.generate("the cad", params(12))]

    outputs = run(client())
    want = expected(ids("the cad"), params(12), 0)
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].token_ids == want.tokens
    assert outputs[-1].outputs[0].text == want.text
    assert not any(output.finished for output in outputs[:-1])
    for output in outputs:
        assert want.tokens[: len(output.outputs[0].token_ids)] == output.outputs[0].token_ids
    idle(served)


def test_many_clients_at_once_get_their_own_text(served):
    async def clients():
        work = [("the cad"[: 1 + i % 7], params(1 + i % 13, seed=i, n=1 + i % 3)) for i in range(40)]
        outputs = await asyncio.gather(*(last(served.generate(prompt, p)) for prompt, p in work))
        for (prompt, p), output in zip(work, outputs, strict=True):
            want = [expected(ids(prompt), p, p.seed, i).tokens for i in range(p.n)]
            assert [sample.token_ids for sample in output.outputs] == want

    run(clients())
    idle(served)


def test_a_slow_reader_skips_outputs_and_piles_nothing_up(served):
    gate = Gate(served.engine)  # or a fast engine is done before the reader has its first output
    gate.let(1)

    async def client():
        stream = served.generate("a", params(100))
        first = await anext(stream)
        gate.open.set()
        deadline = time.monotonic() + 10
        while served.engine.requests and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return first, [output async for output in stream]

    first, rest = run(client())
    assert not first.finished
    assert len(rest) <= 2
    assert rest[-1].outputs[0].token_ids == expected(ids("a"), params(100), 0).tokens


@pytest.mark.parametrize("way", ["cancel", "aclose", "cancel before the first output"])
def test_a_client_that_leaves_aborts_its_request(served, way):
    gate = Gate(served.engine)

    async def client():
        async def read():
            async for _ in served.generate("the", params(150), "leaver"):
                if way == "aclose":
                    return

        stays = asyncio.create_task(last(served.generate("cad", params(20))))
        if way == "aclose":
            gate.let(3)
            stream = served.generate("the", params(150), "leaver")
            await anext(stream)
            await stream.aclose()
        else:
            leaves = asyncio.create_task(read())
            await asyncio.sleep(0)
            if way == "cancel":
                gate.let(5)
                await asyncio.sleep(0.05)
            leaves.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaves
        gate.open.set()
        return await stays

    output = run(client())
    assert output.outputs[0].token_ids == expected(ids("cad"), params(20), 0).tokens
    idle(served)
    assert served.engine.runner.timings["steps"] < 100, "the one who left was served to the end"


def test_a_client_that_leaves_does_not_abort_the_next_one_with_its_id(served):
    async def client():
        old = served.generate("a", params(30), "x")
        await anext(old)
        while served.engine.requests:  # done, but not read to the end: the id is free again
            await asyncio.sleep(0.005)
        gate = Gate(served.engine)
        gate.let(2)
        new = served.generate("the", params(30), "x")
        await anext(new)
        await old.aclose()
        await asyncio.sleep(0.01)
        gate.open.set()
        return await last(new)

    assert run(client()).outputs[0].token_ids == expected(ids("the"), params(30), 0).tokens


def test_abort_ends_the_stream_with_what_there_is(served):
    gate = Gate(served.engine)

    async def client():
        gate.let(4)
        stream = served.generate("the", params(150), "x")
        await anext(stream)
        await served.abort("x")
        await served.abort("unknown")
        gate.let(2)
        return await last(stream)

    output = run(client())
    assert output.outputs[0].finish_reason == "abort"
    assert (
        output.outputs[0].token_ids == expected(ids("the"), params(150), 0).tokens[: len(output.outputs[0].token_ids)]
    )
    gate.open.set()
    idle(served)


def test_a_bad_request_fails_alone(served):
    async def clients():
        good = asyncio.create_task(last(served.generate("the", params(10), "good")))
        for prompt, p, message in [
            ("", params(), "empty"),
            ("a", SamplingParams(alpha={"age": 1}), "age"),
            ("a" * 300, params(), "tokens"),
            (3, params(), "prompt is 3"),
            ("a", 3, "SamplingParams"),
        ]:
            with pytest.raises(ValueError, match=message):
                await last(served.generate(prompt, p))
        return await good

    assert run(clients()).outputs[0].token_ids == expected(ids("the"), params(10), 0).tokens
    idle(served)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(served):
    gate = Gate(served.engine)

    async def clients():
        gate.let(1)
        owner = served.generate("the", params(10), "x")
        await anext(owner)
        intruder = asyncio.create_task(last(served.generate("a", params(), "x")))
        await asyncio.sleep(0)  # it is queued behind the step that the gate holds
        gate.let(1)
        with pytest.raises(ValueError, match="in use"):
            await intruder
        gate.open.set()
        return await last(owner)

    output = run(clients())
    assert output.outputs[0].token_ids == expected(ids("the"), params(10), 0).tokens


def test_the_queue_is_bounded():
    engine = make_engine(max_num_seqs=1)
    gate = Gate(engine)
    llm = AsyncLLM(engine, max_waiting=2)

    async def clients():
        tasks = [asyncio.create_task(last(llm.generate("a", params(2)))) for _ in range(3)]
        await asyncio.sleep(0.05)  # one is in a step that the gate holds; then they are let in together
        tasks += [asyncio.create_task(last(llm.generate("a", params(2)))) for _ in range(10)]
        await asyncio.sleep(0.05)
        gate.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(clients())
    refused = [r for r in results if isinstance(r, QueueFullError)]
    assert refused
    assert "2 requests are waiting" in str(refused[0])
    assert all(r.finished for r in results if not isinstance(r, QueueFullError))
    idle(llm)
    llm.shutdown(timeout=10)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_a_bad_bound_of_the_queue_is_refused(value):
    with pytest.raises(ValueError, match=r"max_waiting is .*, allowed is 1 or more"):
        AsyncLLM(make_engine(), max_waiting=value)


def test_an_error_in_the_loop_reaches_everyone_with_its_cause():
    engine = make_engine()

    def broken(batch):
        raise MemoryError("no more")

    engine.runner.execute = broken
    llm = AsyncLLM(engine)

    async def clients():
        results = await asyncio.gather(*(last(llm.generate("a", params())) for _ in range(5)), return_exceptions=True)
        with pytest.raises(EngineDeadError) as late:
            await last(llm.generate("a", params()))
        return [*results, late.value]

    for error in run(clients()):
        assert isinstance(error, EngineDeadError)
        assert isinstance(error.__cause__, MemoryError)
    llm.shutdown(timeout=10)


def test_shutdown_ends_what_runs():
    engine = make_engine()
    gate = Gate(engine)
    llm = AsyncLLM(engine)

    async def clients():
        gate.let(3)
        task = asyncio.create_task(last(llm.generate("the", params(150))))
        await asyncio.sleep(0.05)
        gate.open.set()
        gate.let(1)
        await asyncio.to_thread(llm.shutdown)
        output = await task
        with pytest.raises(EngineDeadError, match="shut down"):
            await last(llm.generate("a", params()))
        return output

    output = run(clients())
    assert output.outputs[0].finish_reason in ("abort", "length")
    assert_no_leak(engine)
    llm.shutdown()  # again is allowed


def test_drain_serves_what_was_accepted_and_lets_clients_leave():
    engine = make_engine()
    gate = Gate(engine)
    llm = AsyncLLM(engine)

    async def clients():
        gate.let(2)
        stays = asyncio.create_task(last(llm.generate("the", params(30))))
        leaves = asyncio.create_task(last(llm.generate("cad", params(150))))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(asyncio.to_thread(llm.shutdown, True))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineDeadError):
            await last(llm.generate("a", params()))
        leaves.cancel()
        await asyncio.sleep(0.01)
        gate.open.set()
        output = await stays
        await closing
        return output

    assert run(clients()).outputs[0].token_ids == expected(ids("the"), params(30), 0).tokens
    assert engine.runner.timings["steps"] < 60, "the one who left was served to the end"
    assert_no_leak(engine)


def test_a_client_whose_event_loop_has_closed_harms_nobody(served):
    gate = Gate(served.engine)

    async def leave_open():
        gate.let(2)
        stream = served.generate("the", params(150))
        await anext(stream)
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(leave_open())
    loop.close()
    gate.open.set()
    output = run(last(served.generate("cad", params(5))))
    assert output.outputs[0].token_ids == expected(ids("cad"), params(5), 0).tokens
    del stream


def test_options_beside_a_loaded_model_are_refused():
    with pytest.raises(ValueError, match="max_num_seqs: given with a model that is loaded already"):
        AsyncLLM(make_engine(), max_num_seqs=4)


def test_samples_that_wait_are_no_waiting_requests():
    """One request of many samples fills the batch: another one is still taken."""
    engine = make_engine(max_num_seqs=2)
    gate = Gate(engine)
    llm = AsyncLLM(engine, max_waiting=2)
    gate.open.set()

    async def clients():
        many = asyncio.create_task(last(llm.generate("a", SamplingParams(n=8, max_tokens=40, ignore_eos=True, seed=1))))
        while len(engine.scheduler.waiting) < 3:
            await asyncio.sleep(0.001)
        one = await last(llm.generate("b", params(2)))
        return one, await many

    one, many = run(clients())
    assert one.finished
    assert len(many.outputs) == 8
    llm.shutdown(timeout=10)


def test_a_tokenizer_that_fails_on_a_token_fails_its_request_only(served):
    want = [expected(ids(text), params(30), 0).tokens for text in ("a", "the cad")]
    beyond = next(t for t in want[0] if t not in [*want[1], *ids("the cad"), *ids("a")])
    decode = served.engine.tokenizer.decode

    def failing(tokens, *args, **options):
        if beyond in tokens:
            raise IndexError("piece id is out of range")
        return decode(tokens, *args, **options)

    served.engine.tokenizer.decode = failing

    async def clients():
        return await asyncio.gather(*(last(served.generate(text, params(30))) for text in ("a", "the cad")))

    bad, good = run(clients())
    assert bad.outputs[0].finish_reason == "error"
    assert "piece id is out of range" in bad.outputs[0].error
    assert good.outputs[0].token_ids == want[1]
    assert good.outputs[0].finish_reason == "length"
    idle(served)


def test_a_call_that_raises_leaves_nobody_waiting():
    engine = make_engine()
    gate = Gate(engine)
    llm = AsyncLLM(engine)

    def broken(request_id):
        raise MemoryError("no more")

    engine.abort = broken

    async def clients():
        running = asyncio.create_task(last(llm.generate("a", params(100), "running")))
        while not llm._clients:
            await asyncio.sleep(0.005)
        for _ in range(2):  # the one that ends the loop, and one after the end
            llm.abort_soon("running")
        late = asyncio.create_task(last(llm.generate("a", params())))
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(running, late, return_exceptions=True)

    for error in run(clients()):
        assert isinstance(error, EngineDeadError)
        assert isinstance(error.__cause__, MemoryError)
    llm.shutdown(timeout=10)
