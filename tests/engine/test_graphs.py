"""Captured decode steps, on a stand-in for the device: the same tokens as the eager path, and an order that holds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from ensemble_decode import LLM, ExpertPair, SamplingParams
from ensemble_decode.engine import graphs, llm, runner
from ensemble_decode.engine.batch import Batch, StepOutput
from ensemble_decode.engine.lanes import StreamLanes
from ensemble_decode.engine.plan import Record, Sample, Wait
from ensemble_decode.engine.speculation import Speculation, measure_costs
from tests.conftest import Models
from tests.engine.recorder import DeviceError, Recorder
from tests.engine.test_correctness import ensemble, prompts

Runner = runner.Runner


def load(monkeypatch: pytest.MonkeyPatch, path: str, pairs: dict, graph: bool = True, **options: Any) -> LLM:
    """An engine on the stand-in."""
    monkeypatch.setattr(llm, "Runner", partial(Runner, device=Recorder(), graphs=graph))
    out = LLM(path, pairs, dtype="float32", placement="lanes", **options)
    monkeypatch.setattr(llm, "Runner", Runner)
    return out


def mixed(pairs: dict, count: int, **options: Any) -> list[SamplingParams]:
    """Rows that differ in everything that a row may differ in."""
    names = list(pairs)
    return [
        SamplingParams(
            temperature=[0.0, 0.8, 1.1][i % 3],
            top_p=[1.0, 0.9][i % 2],
            top_k=[0, 20, 0, 5][i % 4],
            min_p=[0.0, 0.05][i % 5 == 4],
            seed=100 + i,
            max_tokens=9 + i % 5,
            ignore_eos=True,
            # None, the first pair, the last, all of them: by turns.
            alpha=dict(
                zip(names, [[0.0] * 3, [0.7, 0.0, 0.0], [0.0, 0.4, 0.5], [0.6, -0.3, 0.2]][i % 4], strict=False)
            ),
            **options,
        )
        for i in range(count)
    ]


def tokens(engine: LLM, listed: list, params: Any) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in engine.generate(listed, params, use_tqdm=False)]


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("kind", ["none", "full", "lora", "lora over another base", "expert alone", "three"])
def test_tokens_are_those_of_the_eager_path(
    kind: str, count: int, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, _ = ensemble("llama", kind, models)
    path, params = models.model("llama"), mixed(pairs, count)
    expected = tokens(LLM(path, pairs, dtype="float32", placement="sequential"), prompts(8)[:count], params)
    captured = load(monkeypatch, path, pairs)
    assert tokens(captured, prompts(8)[:count], params) == expected
    found = captured.runner.graphs
    assert found.replays >= 8
    # Sequences end one after another: the step goes through several buckets.
    assert {bucket.rows for bucket in found.steps} <= set(range(1, count + 1))
    assert count < 8 or len({bucket.rows for bucket in found.steps}) > 2
    eager = load(monkeypatch, path, pairs, graph=False)
    assert eager.runner.graphs is None
    assert tokens(eager, prompts(8)[:count], params) == expected


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3"])
def test_other_families(family: str, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {"a": ExpertPair(models.model(family, 1), models.model(family, 2))}
    params = mixed(pairs, 5)
    expected = tokens(LLM(models.model(family), pairs, dtype="float32"), prompts(8)[:5], params)
    assert tokens(load(monkeypatch, models.model(family), pairs), prompts(8)[:5], params) == expected


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_target_s_nucleus(kind: str, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, _ = ensemble("llama", kind, models)
    params = mixed(pairs, 6, nucleus="target")
    expected = tokens(LLM(models.model("llama"), pairs, dtype="float32"), prompts(8)[:6], params)
    captured = load(monkeypatch, models.model("llama"), pairs)
    assert tokens(captured, prompts(8)[:6], params) == expected
    assert {bucket.nucleus for bucket in captured.runner.graphs.steps} >= {"target"}


def test_preemption_and_forks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences lose their blocks, come back to others, and share them: the static buffers follow."""
    pairs, _ = ensemble("llama", "lora", models)
    path = models.model("llama")
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=24, alpha=0.8, ignore_eos=True) for i in range(8)]
    roomy = LLM(path, pairs, dtype="float32")
    expected = tokens(roomy, prompts(8), params)
    tight = load(monkeypatch, path, pairs, kv_cache_bytes=9 * roomy.ensemble.bytes_per_block)
    for order in (list(range(8)), [5, 2, 7, 0, 3, 6, 1, 4]):
        outputs = tight.generate([prompts(8)[i] for i in order], [params[i] for i in order], use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [expected[i] for i in order]
        assert sum(o.metrics.preemptions for o in outputs) > 0
    several = SamplingParams(temperature=0.9, seed=3, n=5, max_tokens=20, alpha=0.5)
    samples = [
        [s.token_ids for s in e.generate(prompts()[3], several, use_tqdm=False)[0].outputs] for e in (roomy, tight)
    ]
    assert samples[0] == samples[1]


def test_views_of_their_own(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.model("llama")
    pairs = {"cfg": ExpertPair.from_prompts(anti_expert="", alpha=0.6)}
    params = SamplingParams(temperature=0.0, max_tokens=12)
    expected = tokens(LLM(path, pairs, dtype="float32"), prompts(), params)
    captured = load(monkeypatch, path, pairs)
    assert tokens(captured, prompts(), params) == expected
    assert captured.runner.graphs.replays > 0


def test_rows_that_ask_for_more_take_the_eager_path(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows go over from one path to the other in the middle of a text."""
    pairs, _ = ensemble("llama", "full", models)
    params = [
        *mixed(pairs, 3),
        SamplingParams(temperature=0.0, min_tokens=3, max_tokens=16),
        SamplingParams(temperature=0.0, max_tokens=6, logprobs=2),
    ]
    expected = tokens(LLM(models.model("llama"), pairs, dtype="float32"), prompts(8)[:5], params)
    captured = load(monkeypatch, models.model("llama"), pairs)
    assert tokens(captured, prompts(8)[:5], params) == expected
    assert 0 < captured.runner.graphs.replays < captured.runner.timings["steps"] - 4


def test_no_more_graphs_than_allowed(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    captured = load(monkeypatch, models.model("llama"), {})
    params = mixed({}, 6)
    expected = tokens(LLM(models.model("llama"), dtype="float32"), prompts(8)[:6], params)
    assert tokens(captured, prompts(8)[:6], params) == expected
    assert len(captured.runner.graphs.steps) == 1


def test_costs_of_speculation_are_those_of_the_steps_that_come(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed at start-up: steps without drafts replayed, but neither what drafts nor what verifies."""
    pairs, _ = ensemble("llama", "full", models)
    captured = load(monkeypatch, models.model("llama"), pairs)
    found = captured.runner.graphs
    replayed: dict[str, set[bool]] = {}

    def execute(batch: Batch) -> StepOutput:
        before = found.replays
        output = captured.runner.execute(batch)
        kind = "draft" if batch.samples[0].mixture else "plain" if len(batch.spans[0].tokens) == 1 else "verification"
        replayed.setdefault(kind, set()).add(found.replays > before)
        return output

    measure_costs(Speculation("expert", 2), captured.engine.layout, execute, 2, captured.runner.num_blocks, rounds=1)
    assert replayed == {"draft": {False}, "plain": {True}, "verification": {False}}


# ── the order of calls ──────────────────────────────────────────────────────────────────────────────────────────────
def test_a_capture_holds_what_is_planned(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, _ = ensemble("llama", "three", models)
    captured = load(monkeypatch, models.model("llama"), pairs)
    tokens(captured, prompts(), mixed(pairs, 4))
    device = captured.runner.device
    steps = captured.runner.graphs.steps.values()
    assert any(len(step.plan.groups) == 3 for step in steps)
    events = captured.runner._lanes._events
    for step, calls in zip(steps, device.captures, strict=True):
        expected: list[tuple] = []
        for operation in step.plan.operations:
            if isinstance(operation, Record | Wait):
                kind = "record" if isinstance(operation, Record) else "wait"
                expected.append((kind, operation.stream, events[operation.event].number))
            elif not isinstance(operation, Sample):
                expected.append(("on", operation.stream))
        assert calls == expected


def test_the_host_waits_once_a_step_and_works_before(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy in, replay, copy out, an event, the next step's inputs, and only then the host waits."""
    pairs, _ = ensemble("llama", "full", models)
    captured = load(monkeypatch, models.model("llama"), pairs)
    device = captured.runner.device
    advance = graphs.HostInputs.advance

    def watched(self: graphs.HostInputs) -> None:
        device.log.append(("advance",))
        advance(self)

    monkeypatch.setattr(graphs.HostInputs, "advance", watched)
    tokens(captured, prompts()[:2], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    starts = [i for i, call in enumerate(device.log) if call == ("replay",)]
    assert len(starts) == captured.runner.graphs.replays
    for start in starts:
        end = device.log.index(("replayed",), start)
        assert device.log[start - 1] == ("copy", "to device")
        assert [call[0] for call in device.log[end + 1 : end + 5]] == ["copy", "record", "advance", "finish"]
        assert not any(call[0] in ("finish", "synchronize") for call in device.log[start:end])


def test_padding_writes_to_the_scratch_block_only(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, _ = ensemble("llama", "lora", models)
    captured = load(monkeypatch, models.model("llama"), pairs)
    monkeypatch.setattr(graphs, "ROWS", (16,))
    params = mixed(pairs, 3)
    expected = tokens(LLM(models.model("llama"), pairs, dtype="float32"), prompts()[:3], params)
    group, blocks = captured.runner.groups[0], captured.runner.num_blocks
    for cache in (*group.k_cache, *group.v_cache):
        cache.fill_(7.0)
    assert tokens(captured, prompts()[:3], params) == expected
    assert {bucket.rows for bucket in captured.runner.graphs.steps} == {16}
    most = sum(-(-(len(p) + q.max_tokens) // 16) for p, q in zip(prompts()[:3], params, strict=True))
    for cache in (*group.k_cache, *group.v_cache):
        by_pool = cache.unflatten(0, (-1, blocks + 1))
        touched = (by_pool != 7.0).flatten(2).any(2)
        assert touched[:, blocks].all()
        assert (touched[:, :blocks].sum(1) <= most).all()


# ── planted faults ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("left_out", ["join", "fork"])
@pytest.mark.parametrize("graph", [True, False], ids=["captured", "eager"])
def test_a_missing_wait_is_found(left_out: str, graph: bool, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, _ = ensemble("llama", "full", models)
    captured = load(monkeypatch, models.model("llama"), pairs, graph=graph)
    carry_out = StreamLanes.carry_out

    def faulty(self: StreamLanes, operations: Any, functions: Any) -> Any:
        kept = [op for op in operations if not (isinstance(op, Wait) and op.event.startswith(left_out))]
        return carry_out(self, kept, functions)

    monkeypatch.setattr(StreamLanes, "carry_out", faulty)
    with pytest.raises(DeviceError, match=r"race|not forked|not joined"):
        tokens(captured, prompts(), SamplingParams(max_tokens=8, temperature=0.0, alpha=0.5, ignore_eos=True))


def test_writing_to_memory_that_a_copy_reads_is_found(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = load(monkeypatch, models.model("llama"), {})
    advance = graphs.HostInputs.advance

    def in_place(self: graphs.HostInputs) -> None:
        self._memories, self._fields = (self._memories[0],) * 2, [self._fields[0]] * 2
        advance(self)

    monkeypatch.setattr(graphs.HostInputs, "advance", in_place)
    with pytest.raises(DeviceError, match="that a copy was reading"):
        tokens(captured, prompts(), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize(
    "fault",
    [
        lambda device: device.buffer((1,), torch.float32),
        lambda device: device.pinned(8),
        lambda device: device.upload([1], dtype=torch.int64),
        lambda device: torch.zeros(1).item(),
        lambda device: torch.tensor([1.0]),
        lambda device: device.synchronize(),
    ],
    ids=["buffer", "pinned", "upload", "item", "numbers", "synchronize"],
)
def test_what_a_capture_must_not_hold_is_found(fault: Any, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = load(monkeypatch, models.model("llama"), {})
    sample = graphs.CapturedStep._sample

    def faulty(self: graphs.CapturedStep) -> None:
        sample(self)
        fault(self._device)

    monkeypatch.setattr(graphs.CapturedStep, "_sample", faulty)
    with pytest.raises(DeviceError, match="inside a capture"):
        tokens(captured, prompts(), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))


def test_a_row_that_is_not_moved_on_changes_the_text(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs made ahead are used: spoil them, and the tokens are others."""
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    captured = load(monkeypatch, models.model("llama"), {})
    expected = tokens(captured, prompts(), params)
    write = graphs.HostInputs._write_start
    advance = graphs.HostInputs.advance

    def spoiled(self: graphs.HostInputs) -> None:
        monkeypatch.setattr(graphs.HostInputs, "_write_start", lambda *_: None)
        advance(self)
        monkeypatch.setattr(graphs.HostInputs, "_write_start", write)

    monkeypatch.setattr(graphs.HostInputs, "advance", spoiled)
    assert tokens(captured, prompts(), params) != expected
