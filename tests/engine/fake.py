"""A model that can be reasoned about: its next token is a hash of the tokens that it sees through the block tables.

:class:`FakeRunner` keeps, for every pool, the token that was written to each slot, and reads sequences back block by
block, as attention does. A block that is shared, freed, copied or reused wrongly, or not computed in a pool, therefore
changes the text. :func:`expected` says what the text must be, from the request alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from ensemble_decode.engine.batch import (
    BLOCK_SIZE,
    Batch,
    SampleRow,
    ScoreRow,
    Span,
    Steering,
    StepOutput,
    TokenLogprobs,
)
from ensemble_decode.engine.drafting import Costs
from ensemble_decode.engine.engine import Engine
from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.engine.speculation import Speculation, Speculator
from ensemble_decode.models.layout import Layout, PairLayout

#: Token 0 ends a text; the others are pieces of UTF-8, some of them parts of one character only.
PIECES = [
    b"",
    *(bytes([c]) for c in b" abcdefghijklmnopqrstuvwxyz."),
    b"ab",
    b"cad",
    b" the",
    *(bytes([c]) for c in "é世😀".encode()),
]
EOS = 0
VOCAB = len(PIECES)

#: Target in pool 0. "gender" has two experts, "tone" no anti-expert, "guide" a prompt of its own over the target.
LAYOUT = Layout(
    vocab_size=VOCAB,
    max_model_len=160,
    target_pool=0,
    num_pools=4,
    pairs=(
        PairLayout("gender", 1.0, expert_pool=1, anti_expert_pool=2),
        PairLayout("tone", 0.0, expert_pool=3, anti_expert_pool=None),
        PairLayout("guide", 0.0, expert_pool=0, anti_expert_pool=0, expert_view=0, anti_expert_view=1),
    ),
    views=(None, "not a {prompt}"),
)
PLAIN = Layout(VOCAB, 160, 0, 1, ())


class PieceTokenizer:
    """As much of a tokenizer as the engine uses: longest piece first, special tokens without text."""

    bos_token_id = None
    chat_template = None

    def __call__(self, text: str) -> SimpleNamespace:
        data, ids = text.encode(), []
        while data:
            piece = max((p for p in PIECES if p and data.startswith(p)), key=len, default=None)
            if piece is None:
                raise AssertionError(f"{text!r} can't be written with the pieces of the test")
            ids.append(PIECES.index(piece))
            data = data[len(piece) :]
        return SimpleNamespace(input_ids=ids)

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        end = b"" if skip_special_tokens else b"<end>"
        return b"".join(end if i == EOS else PIECES[i] for i in ids).decode("utf-8", "replace")


def pick(vocab_size: int, key: object, banned: Iterable[int] = ()) -> int:
    """The model: a token that depends on everything in ``key``; −1 if all are banned."""
    start, forbidden = hash(key), set(banned)
    return next((t for i in range(vocab_size) if (t := (start + i) % vocab_size) not in forbidden), -1)


def score(key: object) -> float:
    """A log-probability that depends on everything in ``key``."""
    return -(hash(key) % 9973) / 1000


class FakeRunner:
    """Executes batches, and holds the scheduler to the contract of :class:`Batch` on the way.

    ``nan`` is a token: a row whose own tokens end with it has no valid sample. ``draft`` is the model that drafts: what
    it says after the tokens that its pool holds.
    """

    def __init__(self, layout: Layout, num_blocks: int, nan: int | None = None) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.nan = nan
        self.timings: dict[str, float] = {"forward": 0.0, "sample": 0.0, "steps": 0}
        self.draft: Callable[[tuple, SampleRow], int] = lambda own, row: pick(layout.vocab_size, own)
        self.batches: list[Batch] = []
        self.computed = [0] * layout.num_pools  # tokens, by pool
        self._slots: list[list[int | None]] = [[None] * (num_blocks * BLOCK_SIZE) for _ in range(layout.num_pools)]

    def execute(self, batch: Batch) -> StepOutput:
        self.batches.append(Batch(list(batch.spans), list(batch.samples), list(batch.scores), list(batch.copies)))
        self.timings["steps"] += 1
        self._copy(batch.copies)
        self._write(batch.spans)
        output = StepOutput([], [])
        for row in batch.samples:
            span = batch.spans[row.span]
            assert span.outputs >= 1, "a row samples from a span without outputs"
            assert row.output < span.outputs
            later = 0 if row.output < 0 else span.outputs - 1 - row.output  # tokens of the span behind this row's
            pools = [pool for pool, _ in row.mixture] or [self.layout.target_pool]
            own = self._read(span, pools[0], later)
            if row.mixture:
                assert not row.steering
                assert all(self._read(span, pool, later) == own for pool in pools), (
                    "drafting pools disagree about the text"
                )
                assert abs(sum(weight for _, weight in row.mixture) - 1) < 1e-6
                output.tokens.append(self.draft(own, row))
                output.logprobs.append(None)
                continue
            assert row.position == len(own)
            edits = row.edits
            if self.nan is not None and own[-1] == self.nan:
                output.tokens.append(-1)
                output.logprobs.append(None)
                continue
            changes: tuple = ()
            if edits is not None:
                counts = [] if edits.counts is None else edits.counts.T.tolist()
                changes = (
                    edits.repetition_penalty,
                    edits.presence_penalty,
                    edits.frequency_penalty,
                    tuple(sorted(token for token, _ in counts)) if edits.repetition_penalty != 1.0 else (),
                    tuple(sorted((token, count) for token, count in counts if count))
                    if edits.presence_penalty or edits.frequency_penalty
                    else (),
                    tuple(sorted(edits.bias.items())),
                )
            filters = (row.temperature, row.top_k, row.top_p, row.min_p, row.nucleus == "target")
            key = (own, self._sides(batch, own, row.steering, later), filters, row.seed, row.position, changes)
            token = pick(self.layout.vocab_size, key, () if edits is None else edits.banned)
            output.tokens.append(token)
            output.logprobs.append(None if row.logprobs < 0 else entry(key, token, row.logprobs))
        output.scores = [self._score(batch, row) for row in batch.scores]
        return output

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        touched = [block for pair in copies for block in set(pair)]
        assert len({d for _, d in copies}) == len(copies), "two copies into one block"
        assert not {s for s, _ in copies} & {d for _, d in copies}, f"the order of copies would matter: {touched}"
        for source, destination in copies:
            for slots in self._slots:
                slots[destination * BLOCK_SIZE : (destination + 1) * BLOCK_SIZE] = slots[
                    source * BLOCK_SIZE : (source + 1) * BLOCK_SIZE
                ]

    def _write(self, spans: list[Span]) -> None:
        written: dict[tuple[int, int], int] = {}
        for index, span in enumerate(spans):
            assert span.tokens, "a span without tokens"
            assert len(span.block_table) * BLOCK_SIZE >= span.start + len(span.tokens), (
                "the block table ends before the span"
            )
            assert 0 <= span.outputs <= len(span.tokens)
            assert list(span.pools) == sorted(set(span.pools))
            assert span.pools
            for pool in span.pools:
                self.computed[pool] += len(span.tokens)
                for position, token in enumerate(span.tokens, span.start):
                    slot = self._slot(span, position)
                    assert (pool, slot) not in written, "two spans write one slot"
                    written[pool, slot] = index
                    self._slots[pool][slot] = token
        for index, span in enumerate(spans):
            for pool in span.pools:
                for position in range(span.start):
                    writer = written.get((pool, self._slot(span, position)), index)
                    assert writer == index, "a span reads what another one writes in the same step"

    @staticmethod
    def _slot(span: Span, position: int) -> int:
        return span.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def _read(self, span: Span, pool: int, later: int = 0) -> tuple[int | None, ...]:
        """What ``pool`` holds up to the span's end, without its ``later`` last tokens."""
        assert pool in span.pools, f"pool {pool} did not compute the span"
        length = span.start + len(span.tokens) - later
        seen = tuple(self._slots[pool][self._slot(span, position)] for position in range(length))
        assert None not in seen, "a slot is read that nothing was written to"
        return seen

    def _sides(self, batch: Batch, own: tuple, steering: tuple[Steering, ...], later: int = 0) -> tuple:
        sides = []
        for item in steering:
            assert item.alpha != 0
            pair = self.layout.pairs[item.pair]
            expert = self._read(batch.spans[item.expert_span], pair.expert_pool, later)
            anti = own
            if pair.anti_expert_pool is not None:
                anti = self._read(batch.spans[item.anti_expert_span], pair.anti_expert_pool, later)
            sides.append((item.pair, item.alpha, expert, anti))
        return tuple(sides)

    def _score(self, batch: Batch, row: ScoreRow) -> list[TokenLogprobs]:
        span = batch.spans[row.span]
        assert len(row.tokens) <= span.outputs
        entries = []
        for offset, token in enumerate(row.tokens):
            later = span.outputs - 1 - offset
            own = self._read(span, self.layout.target_pool, later)
            entries.append(entry((own, self._sides(batch, own, row.steering, later)), token, row.logprobs))
        return entries


def entry(key: object, token: int, best: int) -> TokenLogprobs:
    """What the fake says of ``token`` and the ``best`` at a place that ``key`` describes."""
    top = [(t, score((key, t)), score((key, t, "target")), t + 1) for t in range(best)]
    return TokenLogprobs(token, score((key, token)), score((key, token, "target")), token + 1, top)


@dataclass
class Sample:
    """What one sample of a request must be."""

    tokens: list[int]
    finish_reason: str
    stop_reason: int | str | None
    text: str
    keys: list[object]


def views_of(prompt: list[int], params: SamplingParams, layout: Layout = LAYOUT) -> dict[int, list[int]]:
    """The prompt of each view that a request uses, by the layout's number."""
    views = {0: prompt}
    for index in params.alphas(layout):
        for view in (layout.pairs[index].expert_view, layout.pairs[index].anti_expert_view):
            template = layout.views[view]
            if template is not None:
                text = PieceTokenizer().decode(prompt, skip_special_tokens=True)
                views[view] = PieceTokenizer()(template.replace("{prompt}", text)).input_ids
    return views


def expected(prompt: list[int], params: SamplingParams, seed: int, index: int = 0, layout: Layout = LAYOUT) -> Sample:
    """Sample ``index`` of a request, computed without an engine."""
    own_seed = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    own_seed -= 2**64 if own_seed >= 2**63 else 0
    views, output, keys = views_of(prompt, params, layout), [], []
    alphas = params.alphas(layout)
    filters = (params.temperature, max(params.top_k, 0), params.top_p, params.min_p, params.nucleus == "target")
    penalised = params.presence_penalty or params.frequency_penalty
    edited = params.repetition_penalty != 1 or penalised or params.logit_bias
    stop_ids = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {EOS})
    while True:
        own = tuple(views[0] + output)
        sides = []
        for number, alpha in sorted(alphas.items()):
            pair = layout.pairs[number]
            expert = tuple(views[pair.expert_view] + output)
            anti = own if pair.anti_expert_pool is None else tuple(views[pair.anti_expert_view] + output)
            sides.append((number, alpha, expert, anti))
        banned = stop_ids if len(output) < params.min_tokens else set()
        changes: tuple = ()
        if edited or banned:
            seen = sorted(set(own)) if params.repetition_penalty != 1 else []
            counts = sorted((t, output.count(t)) for t in set(output)) if penalised else []
            bias = sorted((params.logit_bias or {}).items())
            changes = (
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
                tuple(seen),
                tuple(counts),
                tuple(bias),
            )
        keys.append((own, tuple(sides), filters, own_seed, len(own), changes))
        token = pick(layout.vocab_size, keys[-1], banned)
        output.append(token)
        text = PieceTokenizer().decode(output, params.skip_special_tokens)
        if token in stop_ids and not banned:
            tail = 0 if params.include_stop_str_in_output else 1
            text = PieceTokenizer().decode(output[: len(output) - tail], params.skip_special_tokens)
            return Sample(output, "stop", token, text, keys)
        found = [(text.find(stop), -len(stop), stop) for stop in params.stops if stop in text]
        if found and len(output) >= params.min_tokens:
            at, _, stop = min(found)
            return Sample(
                output, "stop", stop, text[: at + (len(stop) if params.include_stop_str_in_output else 0)], keys
            )
        longest = max(len(view) for view in views.values()) + len(output)
        if len(output) == params.max_tokens or longest == layout.max_model_len:
            return Sample(output, "length", None, text, keys)


def make_engine(
    num_blocks: int = 64,
    layout: Layout = LAYOUT,
    *,
    nan: int | None = None,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 48,
    prefix_caching: bool = True,
    tokenizer: bool = True,
    speculation: Speculation | None = None,
) -> Engine:
    runner = FakeRunner(layout, num_blocks, nan)
    speculator = None
    if speculation is not None:
        speculator = Speculator(speculation, layout, Costs({(layout.target_pool,): {1: 1.0, 2: 1.0}}))
    return Engine(
        layout,
        runner,
        num_blocks,
        PieceTokenizer() if tokenizer else None,
        (EOS,),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=prefix_caching,
        speculator=speculator,
    )


def run(engine: Engine, *, stream: bool = False, limit: int = 5000) -> dict[str, object]:
    """Step until nothing is left; the last output of each request, by its id."""
    done = {}
    for _ in range(limit):
        if not engine.has_work:
            return done
        for output in engine.step(stream):
            done[output.request_id] = output
    raise AssertionError(
        f"{limit} steps and still at work: {len(engine.scheduler.running)} running, {len(engine.scheduler.waiting)} waiting"
    )


def assert_no_leak(engine: Engine) -> None:
    """Nothing is held when nothing runs."""
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert not engine.requests
    assert not engine._detokenizers
    assert not engine.scheduler.waiting
    assert not engine.scheduler.running
