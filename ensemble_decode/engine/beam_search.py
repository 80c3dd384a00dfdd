"""Beam search over the ensemble: vLLM's names, shapes and scores.

At every step each beam is a request for one token, with the log-probabilities of the ``2 · beam_width`` best. Beams of one
prompt share its blocks by prefix sharing, and every model's cache follows a beam because all have one block table: nothing
has to be reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from ensemble_decode.engine.detokenizer import decode_output, decoder
from ensemble_decode.engine.engine import Engine, Prompt
from ensemble_decode.engine.outputs import FinishReason, Logprob, RequestOutput
from ensemble_decode.engine.params import SamplingParams, check_integer, check_number
from ensemble_decode.engine.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How to search.

    Parameters
    ----------
    beam_width : int
        Beams kept at every step, and sequences returned; 1 … 500.
    max_tokens : int
        Most new tokens.
    ignore_eos : bool
        Whether the end-of-text token is a token like others.
    temperature : float
        Divides the scores; 0 counts as 1, as nothing is sampled.
    length_penalty : float
        Sequences are ranked by their cumulative log-probability / length ** length_penalty. The length counts the prompt's
        tokens and not the end-of-text token.
    alpha : float or dict of str to float, optional
        As in :class:`SamplingParams`.

    Raises
    ------
    ValueError
        One line: the parameter, its value, what is allowed.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    alpha: float | dict[str, float] | None = None
    #: What each beam asks of the engine at every step; derived.
    step: SamplingParams = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("beam_width", self.beam_width, 1, 500)
        check_number("length_penalty", self.length_penalty)
        step = SamplingParams(
            alpha=self.alpha,
            temperature=1.0 if self.temperature == 0 else self.temperature,
            top_k=1,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            seed=0,
            logprobs=2 * self.beam_width,
        )
        object.__setattr__(self, "step", step)


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One sequence. ``tokens`` begins with the prompt's; ``logprobs`` has an entry for each new token."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best sequences of a prompt, best first. ``error`` says in one line why there are none."""

    sequences: list[BeamSearchSequence]
    error: str | None = None


class _Search:
    """One prompt's beams."""

    def __init__(self, engine: Engine, prompt: Prompt, params: BeamSearchParams) -> None:
        self.engine, self.prompt, self.params = engine, prompt, params
        request = engine.make_request(prompt, params.step)  # whatever is wrong is found here
        self.prompt_tokens = request.prompt_token_ids
        longest = max(len(view.tokens) for view in request.sequences[0].views)
        self.steps = min(params.max_tokens, engine.layout.max_model_len - longest)
        self.beams = [BeamSearchSequence(list(self.prompt_tokens), [])]
        self.completed: list[BeamSearchSequence] = []
        self.error: str | None = None

    def requests(self) -> list[Request]:
        """One for the next token of each beam."""
        step = replace(self.params.step, max_tokens=1)
        start = len(self.prompt_tokens)
        return [self.engine.make_request(self.prompt, step, continued=beam.tokens[start:]) for beam in self.beams]

    def advance(self, outputs: list[RequestOutput]) -> None:
        """Keep the best continuations of the beams; those that end are complete."""
        following: list[BeamSearchSequence] = []
        for beam, output in zip(self.beams, outputs, strict=True):
            sample = output.outputs[0]
            if sample.finish_reason == "error":
                self.beams, self.completed, self.error = [], [], sample.error
                return
            assert sample.logprobs is not None
            entry = sample.logprobs[0]
            for token, logprob in entry.items():
                longer = BeamSearchSequence(
                    [*beam.tokens, token], [*beam.logprobs, entry], beam.cum_logprob + logprob.logprob
                )
                if token in self.engine.scheduler.eos and not self.params.ignore_eos:
                    self.completed.append(replace(longer, finish_reason="stop", stop_reason=token))
                else:
                    following.append(longer)
        self.beams = sorted(following, key=self._rank)[: self.params.beam_width]
        self.steps -= 1
        if self.steps == 0:
            self.completed += [replace(beam, finish_reason="length") for beam in self.beams]
            self.beams = []

    def _rank(self, beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.finish_reason == "stop")
        return -beam.cum_logprob / length**self.params.length_penalty

    def result(self) -> BeamSearchOutput:
        best = sorted(self.completed, key=self._rank)[: self.params.beam_width]
        return BeamSearchOutput([replace(beam, text=self._text(beam)) for beam in best], self.error)

    def _text(self, beam: BeamSearchSequence) -> str | None:
        """The text of the new tokens; None without a tokenizer."""
        if self.engine.tokenizer is None:
            return None
        start = len(self.prompt_tokens)
        output = beam.tokens[start : len(beam.tokens) - (beam.finish_reason == "stop")]
        return decode_output(decoder(self.engine.tokenizer, True), self.prompt_tokens, output)


def beam_search(
    engine: Engine,
    prompts: list[Prompt],
    params: BeamSearchParams,
    run: Callable[[list[Request]], list[RequestOutput]],
    use_tqdm: bool,
) -> list[BeamSearchOutput]:
    """Search for the best continuations of prompts, all of them together; ``run`` carries requests out."""
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params is {params!r}, a BeamSearchParams is allowed")
    searches = []
    for index, prompt in enumerate(prompts):
        try:
            searches.append(_Search(engine, prompt, params))
        except ValueError as error:
            raise ValueError(
                f"beam_search: prompt {index}: {error}" if len(prompts) > 1 else f"beam_search: {error}"
            ) from None
    with tqdm(total=params.max_tokens, desc="beam_search", unit="token", disable=not use_tqdm) as bar:
        while active := [search for search in searches if search.beams]:
            requests = [search.requests() for search in active]
            outputs = iter(run([request for one in requests for request in one]))
            for search, one in zip(active, requests, strict=True):
                search.advance([next(outputs) for _ in one])
            bar.update()
    return [search.result() for search in searches]
