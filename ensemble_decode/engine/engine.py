"""The engine: requests in, one step after another, outputs out."""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from ensemble_decode.engine.batch import Batch, StepOutput, TokenLogprobs
from ensemble_decode.engine.block_manager import BlockManager
from ensemble_decode.engine.detokenizer import Decode, Detokenizer, decode_output, decoder
from ensemble_decode.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.engine.request import ActivePair, Request, Sequence, View
from ensemble_decode.engine.scheduler import Scheduler
from ensemble_decode.engine.speculation import Speculator
from ensemble_decode.models.layout import Layout

Prompt = str | list[int] | Mapping[str, Any]


class Executor(Protocol):
    """What the engine needs of a runner."""

    timings: dict[str, float]

    def execute(self, batch: Batch) -> StepOutput: ...


class Engine:
    """Requests, a scheduler and a runner. Not thread-safe: one thread calls it.

    Parameters
    ----------
    layout : Layout
    runner : Executor
    num_blocks : int
    tokenizer : optional
        None: prompts must be token ids and outputs have no text.
    seed : int
        Where the seeds of requests that bring none come from.
    speculator : Speculator, optional
        Drafts tokens for the steps to verify; None: a step gives one token a sequence.
    """

    def __init__(
        self,
        layout: Layout,
        runner: Executor,
        num_blocks: int,
        tokenizer: Any | None = None,
        eos_token_ids: tuple[int, ...] = (),
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        speculator: Speculator | None = None,
    ) -> None:
        self.layout = layout
        self.runner = runner
        self.speculator = speculator
        self.tokenizer = tokenizer
        self.blocks = BlockManager(num_blocks, enable_prefix_caching)
        self.scheduler = Scheduler(layout, self.blocks, max_num_seqs, max_num_batched_tokens, eos_token_ids)
        self.requests: dict[str, Request] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._random = random.Random(seed)
        self._ids = itertools.count()
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._decoders: dict[bool, Decode] = {}
        self._longest_token: int | None = None  # in characters, once it is known

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────
    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        score_only: bool = False,
    ) -> Request:
        """Check a request and queue it.

        Raises
        ------
        ValueError
            The request can't be served: one line that names what is wrong, its value and what is allowed.
        """
        request = self.make_request(prompt, params or SamplingParams(), request_id, score_only=score_only)
        self.enqueue(request)
        return request

    def enqueue(self, request: Request) -> None:
        """Queue a request that :meth:`make_request` made."""
        self.scheduler.add(request)
        self.requests[request.request_id] = request

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        score_only: bool = False,
        continued: list[int] | None = None,
    ) -> Request:
        """Check a request, without queueing it. ``continued`` is what an earlier request made of the prompt: every view sees it."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is {params!r}, a SamplingParams is allowed")
        params.check(self.layout)
        if params.stops and self.tokenizer is None:
            raise ValueError(f"stop is {params.stop!r}, but the model folder has no tokenizer: use stop_token_ids")
        if request_id is None:
            request_id = next(name for number in self._ids if (name := f"request-{number}") not in self.requests)
        if not isinstance(request_id, str):
            raise ValueError(f"request_id is {request_id!r}, a string is allowed")
        if request_id in self.requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        text, tokens, own_prompts = self._prompt(prompt)
        views, pairs = self._views(tokens, text, own_prompts, params)
        if continued:
            tokens = tokens + continued
            for view in views:
                view.tokens += continued
        if len(views) > 1 and (score_only or params.prompt_logprobs is not None):
            raise ValueError(
                "prompt_logprobs and score need every model to see the same tokens, pairs of prompts do not"
            )
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        request = Request(
            request_id, text, tokens, params, seed, pairs, RequestMetrics(time.perf_counter()), score_only
        )
        if score_only and len(tokens) > 1:
            views[0].tokens = tokens[:-1]  # nothing is asked of the last one
        request.sequences.append(Sequence(request, 0, views))
        self.scheduler.check(request)
        return request

    def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int], dict[str, dict[str, str]]]:
        own: dict[str, dict[str, str]] = {}
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "pair_prompts"}
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise ValueError(
                    f"prompt has the keys {list(prompt)}, allowed are 'prompt' or 'prompt_token_ids', and 'pair_prompts'"
                )
            own = self._own_prompts(prompt.get("pair_prompts", {}))
            prompt = prompt.get("prompt", prompt.get("prompt_token_ids"))  # type: ignore[assignment]
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt is empty, at least one character is needed")
            return prompt, self._tokenize(prompt), own
        if not isinstance(prompt, list | tuple):
            raise ValueError(f"prompt is {prompt!r}, a string or a list of token ids is allowed")
        if not prompt:
            raise ValueError("prompt is empty, at least one token is needed")
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.layout.vocab_size:
                raise ValueError(
                    f"prompt holds the token {token!r}, allowed are integers 0 … {self.layout.vocab_size - 1}"
                )
        return None, list(prompt), own

    def _own_prompts(self, value: Any) -> dict[str, dict[str, str]]:
        known = {pair.name: pair for pair in self.layout.pairs if pair.expert_view or pair.anti_expert_view}
        if not isinstance(value, Mapping):
            raise ValueError(f"pair_prompts is {value!r}, a dict of pair name to prompts is allowed")
        for name, sides in value.items():
            if name not in known:
                raise ValueError(
                    f"pair_prompts names {name!r}, pairs of prompts are {', '.join(sorted(map(repr, known))) or 'none'}"
                )
            pair = known[name]
            views = {"expert": pair.expert_view, "anti_expert": pair.anti_expert_view}
            allowed = [side for side, view in views.items() if view]  # the other sees the request's own prompt
            known_sides = isinstance(sides, Mapping) and not set(sides) - set(allowed)
            if not known_sides or not all(isinstance(text, str) for text in sides.values()):
                raise ValueError(
                    f"pair_prompts[{name!r}] is {sides!r}, a dict of strings for {' and '.join(map(repr, allowed))} is allowed"
                )
        return {name: dict(sides) for name, sides in value.items()}

    def _words(self) -> Iterable[str]:
        """The tokenizer's vocabulary, where it tells it."""
        return getattr(self.tokenizer, "get_vocab", dict)()

    def _tokenize(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                "prompt is a string, but the model folder has no tokenizer: a list of token ids is allowed"
            )
        if self._longest_token is None:
            self._longest_token = max((len(word) for word in self._words()), default=0)
        most = self.layout.max_model_len * self._longest_token
        if len(text) > most > 0:  # before it is read: megabytes of text would hold up everyone
            raise ValueError(
                f"the prompt has {len(text)} characters, allowed are {most} "
                f"(max_model_len {self.layout.max_model_len} tokens, the longest of {self._longest_token} characters)"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which is no text
            raise ValueError(f"prompt holds {text[error.start]!r} at {error.start}, Unicode text is allowed") from None
        tokens = list(self.tokenizer(text).input_ids)
        if not tokens:
            raise ValueError(f"prompt is {text!r}, which has no tokens: at least one is needed")
        return tokens

    def _views(
        self, tokens: list[int], text: str | None, own: dict[str, dict[str, str]], params: SamplingParams
    ) -> tuple[list[View], list[ActivePair]]:
        """The views that the active pairs need, the request's own first, and each pair's places among them."""
        alphas = params.alphas(self.layout)
        active = tuple(alphas)
        views = [View(list(tokens), self.layout.pools_of(active, 0))]
        place = {0: 0}

        def place_of(view: int, name: str, side: str) -> int:
            if view not in place:
                template = own.get(name, {}).get(side, self.layout.views[view])
                assert template is not None
                place[view] = len(views)
                views.append(View(self._fill(template, text, tokens), self.layout.pools_of(active, view)))
            return place[view]

        pairs = []
        for index, alpha in alphas.items():
            pair = self.layout.pairs[index]
            expert, anti = (
                place_of(pair.expert_view, pair.name, "expert"),
                place_of(pair.anti_expert_view, pair.name, "anti_expert"),
            )
            pairs.append(ActivePair(index, alpha, expert, anti))
        return views, pairs

    def _fill(self, template: str, text: str | None, tokens: list[int]) -> list[int]:
        """Tokens of a pair's own prompt. "" stands for no prompt: the beginning of a text, or the last token alone."""
        if template == "":
            bos = getattr(self.tokenizer, "bos_token_id", None)
            return tokens[-1:] if bos is None else [bos]
        if text is None and "{prompt}" in template:
            if self.tokenizer is None:
                raise ValueError("a pair of prompts needs the prompt's text, but the model folder has no tokenizer")
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return self._tokenize(template.replace("{prompt}", text or ""))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; its samples so far come back with finish reason "abort". None if it is not here."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        self.scheduler.abort(request)
        return self._close(request)

    def reset(self) -> None:
        """Forget every request and the cache: right after an interrupt, which can strike in the middle of anything."""
        old = self.scheduler
        self.blocks = BlockManager(self.blocks.num_blocks, self.blocks.prefix_caching)
        self.scheduler = Scheduler(self.layout, self.blocks, old.max_num_seqs, old.max_num_batched_tokens, old.eos)
        self.requests.clear()
        self._detokenizers.clear()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def step(self, stream: bool = True) -> list[RequestOutput]:
        """One step of everything that runs. Returns the requests that went on (or only those that ended, without ``stream``)."""
        start = time.perf_counter()
        if self.speculator is not None:
            self.speculator.propose(self.scheduler, self.runner.execute)
        batch = self.scheduler.schedule()
        if not batch.spans:
            return []
        begun = time.perf_counter()
        output = self.runner.execute(batch)
        seconds = time.perf_counter() - begun
        changed = self.scheduler.update(output)
        now = time.perf_counter()
        outputs: list[RequestOutput] = []
        touched: dict[str, Request] = {}
        for sequence in changed:
            request = sequence.request
            if request.metrics.first_token is None:
                request.metrics.first_token = now
            if stream or request.params.stops:
                self._guard(self._read, sequence)
            touched[request.request_id] = request
        if self.speculator is not None:
            self.speculator.observe(batch, seconds, self.scheduler.taken)
        for request in touched.values():
            output_so_far = self.output(request) if stream and not request.finished else None
            if request.finished:  # perhaps by that: a text that can't be read ends its sample
                outputs.append(self._close(request))
            elif output_so_far is not None:
                outputs.append(output_so_far)
        self._seconds["total"] += time.perf_counter() - start
        self._seconds["steps"] += 1
        return outputs

    @property
    def timings(self) -> dict[str, float]:
        """Seconds so far: ``total`` of all steps, ``forward`` and ``sample`` of them (drafts' too); and the number of ``steps``."""
        return {**self.runner.timings, **self._seconds}

    @property
    def stats(self) -> dict[str, float]:
        """:attr:`timings`, and with speculation its statistics."""
        return {**self.timings, **({} if self.speculator is None else self.speculator.statistics)}

    def _guard(self, read: Callable[[Sequence], None], sequence: Sequence) -> None:
        """Let a sample fail by itself where its tokens have no text: some tokenizers raise on ids that a padded head has."""
        try:
            read(sequence)
        except Exception as error:
            reader = self._detokenizers.get(sequence)
            sequence.text = "" if reader is None else reader.text
            self.scheduler.finish(sequence, "error")
            sequence.finish_reason, sequence.stop_reason = "error", None
            sequence.error = f"the tokenizer failed on the output's tokens: {error!r}"

    def _read(self, sequence: Sequence) -> None:
        """Bring a sequence's text up to date, and end the sequence where a stop string is met."""
        if self.tokenizer is None:
            return
        params = sequence.request.params
        reader = self._detokenizers.get(sequence)
        if reader is None:
            reader = self._detokenizers[sequence] = Detokenizer(
                self._decoder(params),
                sequence.views[0].tokens[: -len(sequence.output) or None],
                params.stops,
                params.include_stop_str_in_output,
            )
        met = None
        for token in sequence.output[reader.pushed : self._text_end(sequence)]:
            met = reader.push([token], may_stop=reader.pushed + 1 >= params.min_tokens)
            if met is not None:
                break
        if met is None and sequence.finish_reason == "length":
            met = reader.flush()
        if met is not None:
            # Of several new tokens, those after the one that completes the stop string were never asked for, nor was what
            # came of them: an end-of-text token or an invalid row.
            beyond = sequence.cut(reader.pushed)
            if beyond:
                self.scheduler.taken[sequence].cut(beyond)
            if beyond or sequence.finish_reason in (None, "length", "error"):
                self.scheduler.finish(sequence, "stop", met)
                sequence.finish_reason, sequence.stop_reason, sequence.error = "stop", met, None
            sequence.text = reader.text

    def _decoder(self, params: SamplingParams) -> Decode:
        skip = params.skip_special_tokens
        if skip not in self._decoders:
            self._decoders[skip] = decoder(self.tokenizer, skip)
        return self._decoders[skip]

    # ── outputs ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def output(self, request: Request) -> RequestOutput:
        """A request as it stands."""
        prompt_logprobs = None
        if request.scores_prompt:
            prompt_logprobs = [None, *self._shown(request.prompt_scores, request.shown_prompt)]
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            [self._completion(sequence) for sequence in request.sequences],
            request.finished,
            request.seed,
            request.metrics,
            prompt_logprobs,
        )

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        return CompletionOutput(
            sequence.index,
            self._text(sequence),
            list(sequence.output),
            sequence.cumulative_logprob if sequence.logprobs else None,
            None
            if sequence.request.params.logprobs is None
            else self._shown(sequence.logprobs, sequence.shown_logprobs),
            sequence.finish_reason,
            sequence.stop_reason,
            sequence.error,
        )

    def _text(self, sequence: Sequence) -> str:
        if self.tokenizer is None or not sequence.output:
            return ""
        if not sequence.finished:  # perhaps a sample that waits, with tokens of a step that was not streamed
            self._guard(self._read, sequence)
        if not sequence.finished:
            return self._detokenizers[sequence].safe_text
        if sequence.text is None:
            self._guard(self._read_all, sequence)
        assert sequence.text is not None
        return sequence.text

    def _read_all(self, sequence: Sequence) -> None:
        """The final text of a sequence that is over."""
        reader, end = self._detokenizers.get(sequence), self._text_end(sequence)
        if reader is not None:
            reader.push(sequence.output[reader.pushed : end], may_stop=False)
            reader.flush()
            sequence.text = reader.text
        else:
            decode, prompt = self._decoder(sequence.request.params), sequence.request.prompt_token_ids
            sequence.text = decode_output(decode, prompt, sequence.output[:end])

    @staticmethod
    def _text_end(sequence: Sequence) -> int:
        """How many of its tokens are text: not the one that ended it, unless that is asked for."""
        ended_by_token = sequence.finish_reason == "stop" and isinstance(sequence.stop_reason, int)
        return len(sequence.output) - (ended_by_token and not sequence.request.params.include_stop_str_in_output)

    def _shown(self, entries: list[TokenLogprobs], shown: list[dict[int, Logprob]]) -> list[dict[int, Logprob]]:
        """``entries`` as outputs show them. What was shown before is kept in ``shown``: a stream would do all of it at each step."""
        shown.extend(self._logprobs(entry) for entry in entries[len(shown) :])
        return list(shown)

    def _logprobs(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        found = {entry.token: Logprob(entry.logprob, entry.rank, self._token_text(entry.token), entry.target_logprob)}
        for token, logprob, target, rank in entry.top:
            found.setdefault(token, Logprob(logprob, rank, self._token_text(token), target))
        return found

    def _token_text(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        try:
            return self.tokenizer.decode([token])
        except Exception:  # an id of a padded head, among the best: the numbers stand without its text
            return None

    def _close(self, request: Request) -> RequestOutput:
        request.metrics.finished = time.perf_counter()
        output = self.output(request)
        del self.requests[request.request_id]
        for sequence in request.sequences:
            self._detokenizers.pop(sequence, None)
        return output
