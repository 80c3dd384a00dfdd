"""``LLM``: generate and score with a list of prompts, in the caller's thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ensemble_decode.engine.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from ensemble_decode.engine.engine import Engine, Prompt
from ensemble_decode.engine.lanes import Placement
from ensemble_decode.engine.outputs import RequestOutput, Score
from ensemble_decode.engine.params import SamplingParams, check_integer
from ensemble_decode.engine.request import Request
from ensemble_decode.engine.runner import Runner
from ensemble_decode.engine.speculation import Speculation, Speculator
from ensemble_decode.models.ensemble import Ensemble, load_ensemble
from ensemble_decode.models.loading import Quantization
from ensemble_decode.models.pairs import ExpertPair
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

if TYPE_CHECKING:
    from ensemble_decode.explain.explanation import Explanation

_DEFAULT_KV_BYTES = 2 << 30


class LLM:
    """A target model with expert pairs that steer it.

    Parameters
    ----------
    model : str or path
        Hub id or folder of safetensors, any causal LM with full attention that transformers knows.
    pairs : dict of str to ExpertPair or folder of ``ensemble-decode train``, optional
        What steers it, by name.
    dtype : str or torch.dtype
        "auto" picks what the machine is good at; "float32", "bfloat16", "float16".
    device : str
        "auto": the first GPU where torch, Triton and the compiled operators can use one, else the CPU; "cpu"; "cuda" or
        "cuda:N". Nothing has run on a GPU yet: "cpu" stays off it.
    quantization : {"int8"}, optional
        Keep the weights of the target, the experts and a draft model as int8, a scale for each output channel: half of
        bfloat16's bytes to read at each step (on a CPU). Arithmetic, caches and adapters stay in ``dtype``.
    max_num_seqs : int
        Sequences decoded at once.
    max_model_len : int, optional
        Longest sequence, prompt and output together. Default: the shortest context of the models.
    kv_cache_bytes : int, optional
        Memory for keys and values of all models. Default: room for ``max_num_seqs`` sequences of ``max_model_len``, at
        most 2 GiB and a quarter of the memory that is free.
    speculation : Speculation, optional
        Draft tokens and verify several in one step; the text stays the same.
    seed : int
        Where the seeds of requests that bring none come from.
    max_num_batched_tokens : int
        Tokens of one step, counted for each model that computes them; longer prompts are computed in chunks.
    enable_prefix_caching : bool
        Whether common beginnings of prompts are computed once.
    placement : {"auto", "sequential", "lanes"}
        Where groups of models run. "auto" measures at start-up.

    Raises
    ------
    ValueError
        One line that names what is wrong, its value and what is allowed.

    Examples
    --------
    >>> llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct",
    ...           pairs={"gender": ExpertPair("out/expert", "out/anti_expert")})          # doctest: +SKIP
    >>> llm.generate("The nurse said that", SamplingParams(alpha=1.0, top_p=0.9))[0].outputs[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PathLike[str],
        pairs: Mapping[str, ExpertPair | str | PathLike[str]] | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        quantization: Quantization | None = None,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        kv_cache_bytes: int | None = None,
        speculation: Speculation | None = None,
        seed: int = 0,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True,
        placement: Placement = "auto",
    ) -> None:
        if not isinstance(model, str | PathLike):
            raise ValueError(f"model is {model!r}, a hub id or a folder is allowed")
        if speculation is not None and not isinstance(speculation, Speculation):
            raise ValueError(f"speculation is {speculation!r}, allowed are None and a Speculation")
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, allowed is 1 or more")
        if max_model_len is not None:
            check_integer("max_model_len", max_model_len, 1)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}, allowed is an integer")
        if not isinstance(enable_prefix_caching, bool):
            raise ValueError(f"enable_prefix_caching is {enable_prefix_caching!r}, allowed are True and False")
        draft = None if speculation is None or speculation.draft == "ngram" else speculation.draft
        self.ensemble = load_ensemble(
            str(model),
            pairs,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            draft=draft,
            quantization=quantization,
        )
        blocks = _num_blocks(self.ensemble, kv_cache_bytes, max_num_seqs)
        self.runner = Runner(self.ensemble, blocks, placement)
        speculator = None
        if speculation is not None:
            speculator = Speculator.measured(
                speculation, self.ensemble.layout, self.runner.execute, max_num_seqs, blocks
            )
            self.runner.timings.clear()  # measuring is no work of any request
        self.engine = Engine(
            self.ensemble.layout,
            self.runner,
            blocks,
            self.ensemble.tokenizer,
            self.ensemble.eos_token_ids,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            speculator=speculator,
        )

    @property
    def stats(self) -> dict[str, float]:
        """Seconds and steps so far, and with speculation what was drafted, accepted and saved; see ``docs/speculation.md``."""
        return self.engine.stats

    @property
    def tokenizer(self) -> Any | None:
        """The target's tokenizer; None where its folder has none."""
        return self.ensemble.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts; all of them run together.

        Parameters
        ----------
        prompts : str, list of int, dict, or a list of these
            Text, token ids, or ``{"prompt" | "prompt_token_ids": …, "pair_prompts": {pair: {"expert": …, "anti_expert": …}}}``.
        params : SamplingParams or list of them
            One for all prompts, or one each.
        use_tqdm : bool
            Show a progress bar.

        Returns
        -------
        list of RequestOutput
            In the order of the prompts. A request that fails while it runs has ``finish_reason`` "error" and an ``error``;
            the others are not touched by it.

        Raises
        ------
        ValueError
            A prompt or parameter that can't be served, with its index; nothing has run then.
        """
        listed = _as_list(prompts)
        each = _one_each(params, len(listed))
        return self._run(
            [(prompt, param, False) for prompt, param in zip(listed, each, strict=True)], "generate", use_tqdm
        )

    def chat(
        self,
        messages: list[dict[str, str]] | list[list[dict[str, str]]],
        params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, formatted by the tokenizer's chat template."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("chat needs a tokenizer with a chat template, this model has none: use generate")
        assert self.tokenizer is not None
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        for index, conversation in enumerate(conversations):
            if not isinstance(conversation, list) or not conversation or not all(map(_is_message, conversation)):
                raise ValueError(
                    f"chat: conversation {index} is {conversation!r}, a list of dicts with 'role' and 'content' is allowed"
                )
        ids = [
            self.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations
        ]
        return self.generate(ids, params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """The most probable continuations of prompts under the ensemble, as far as a beam search finds them.

        Parameters
        ----------
        prompts : str, list of int, dict, or a list of these
            As in :meth:`generate`.
        params : BeamSearchParams
            For all prompts.
        use_tqdm : bool
            Show a progress bar.

        Returns
        -------
        list of BeamSearchOutput
            In the order of the prompts, each with up to ``beam_width`` sequences, best first. A prompt that fails while it
            runs has an ``error`` and no sequences.

        Raises
        ------
        ValueError
            A prompt or parameter that can't be served; nothing has run then.

        Examples
        --------
        >>> llm.beam_search("The nurse said that", BeamSearchParams(beam_width=4, max_tokens=12))  # doctest: +SKIP
        """
        return beam_search(
            self.engine,
            _as_list(prompts),
            params,
            lambda requests: self._finish(requests, "beam_search", False),
            use_tqdm,
        )

    def score(
        self, texts: Prompt | Sequence[Prompt], alpha: float | dict[str, float] | None = None, *, use_tqdm: bool = False
    ) -> list[Score]:
        """Per-token log-probabilities of texts under the ensemble, and under the target alone.

        Parameters
        ----------
        texts : str, list of int, or a list of these
            A text's first token is conditioned on the beginning-of-text token where the tokenizer puts one there;
            without one it has no log-probability (None).
        alpha : float or dict, optional
            As in :class:`SamplingParams`.

        Returns
        -------
        list of Score
            Natural logarithms, at temperature 1, one per token of ``token_ids``.

        Raises
        ------
        ValueError
            A text or α that can't be served; a pair of prompts with α ≠ 0, whose sides see other tokens than the target.
        """
        params = SamplingParams(alpha=alpha, prompt_logprobs=0, max_tokens=1)
        listed = _as_list(texts)
        outputs = self._run([(text, params, True) for text in listed], "score", use_tqdm)
        return [_score(output) for output in outputs]

    def next_logprobs(
        self, prompts: Prompt | Sequence[Prompt], alpha: float | dict[str, float] | None = None
    ) -> torch.Tensor:
        """Log-probabilities of every token to come next, under the ensemble.

        Parameters
        ----------
        prompts : str, list of int, dict, or a list of these
            As in :meth:`generate`.
        alpha : float or dict, optional
            As in :class:`SamplingParams`; 0 is the target alone.

        Returns
        -------
        float32 tensor [N, V]
            Natural logarithms at temperature 1, a row a prompt, on the CPU: 4·V bytes each, 0.2 MB at V = 49,152.

        Raises
        ------
        ValueError
            A prompt or α that can't be served, with its index.
        """
        from ensemble_decode.engine.next_logprobs import next_logprobs  # takes an LLM, so not imported above

        params = SamplingParams(alpha=alpha, max_tokens=1)
        return next_logprobs(self, self._requests([(p, params, False) for p in _as_list(prompts)], "next_logprobs"))

    def explain(self, prompt: Prompt, params: SamplingParams | None = None, *, top: int = 5) -> Explanation:
        """Continue a prompt and say what every pair did to every token.

        The text is the one that :meth:`generate` gives. Then one chunked pass over it gives the scores of every member at
        every position; the decode path is not touched.

        Parameters
        ----------
        prompt : str, list of int or dict
            One prompt, as in :meth:`generate`.
        params : SamplingParams, optional
            ``n`` must be 1.
        top : int
            How many of the tokens that were raised most, and lowered most, are listed at each step.

        Returns
        -------
        Explanation

        Raises
        ------
        ValueError
            What :meth:`generate` refuses, ``n`` above 1, or a request that failed while it ran.
        """
        from ensemble_decode.explain.analysis import explain  # a user of LLM, so not imported above

        return explain(self, prompt, params or SamplingParams(), top)

    def _run(self, work: list[tuple[Prompt, SamplingParams, bool]], verb: str, use_tqdm: bool) -> list[RequestOutput]:
        return self._finish(self._requests(work, verb), verb, use_tqdm)

    def _finish(self, requests: list[Request], verb: str, use_tqdm: bool) -> list[RequestOutput]:
        engine = self.engine
        done: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                engine.enqueue(request)
            with tqdm(total=len(requests), desc=verb, unit="prompt", disable=not use_tqdm) as bar:
                while len(done) < len(requests):
                    for output in engine.step(stream=False):
                        done[output.request_id] = output
                        bar.update()
        except BaseException:  # Ctrl-C above all: whatever stops us, the engine is left empty and usable
            engine.reset()
            raise
        return [done[request.request_id] for request in requests]

    def _requests(self, work: list[tuple[Prompt, SamplingParams, bool]], verb: str) -> list[Request]:
        requests = []
        for index, (prompt, params, score_only) in enumerate(work):
            try:
                requests.append(self.engine.make_request(prompt, params, score_only=score_only))
            except ValueError as error:
                raise ValueError(f"{verb}: prompt {index}: {error}" if len(work) > 1 else f"{verb}: {error}") from None
        return requests


def _num_blocks(ensemble: Ensemble, kv_cache_bytes: int | None, max_num_seqs: int) -> int:
    per_block = ensemble.bytes_per_block
    views = len(ensemble.layout.views)
    per_sequence = views * -(-ensemble.layout.max_model_len // BLOCK_SIZE)
    if kv_cache_bytes is None:
        most = min(_DEFAULT_KV_BYTES, _free_memory() // 4)
        return max(1, min(most // per_block, max_num_seqs * per_sequence))
    if isinstance(kv_cache_bytes, bool) or not isinstance(kv_cache_bytes, int) or kv_cache_bytes < per_block:
        raise ValueError(
            f"kv_cache_bytes is {kv_cache_bytes!r}, allowed is {per_block} (one block of {BLOCK_SIZE} tokens) or more"
        )
    return kv_cache_bytes // per_block


def _free_memory() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * _DEFAULT_KV_BYTES


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {prompts!r}, a string, token ids, a dict or a list of these is allowed")
    listed = list(prompts)
    if listed and all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
        return [listed]
    return listed


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple):
        raise ValueError(f"params is {params!r}, a SamplingParams or a list of them is allowed")
    listed = list(params)
    if len(listed) != count:
        raise ValueError(f"params is a list of {len(listed)}, allowed is one, or one for each of the {count} prompts")
    return listed


def _score(output: RequestOutput) -> Score:
    entries = output.prompt_logprobs or [None]
    logprobs: list[float | None] = []
    target: list[float | None] = []
    ranks: list[int | None] = []
    for token, entry in zip(output.prompt_token_ids, entries, strict=True):
        logprobs.append(None if entry is None else entry[token].logprob)
        target.append(None if entry is None else entry[token].target_logprob)
        ranks.append(None if entry is None else entry[token].rank)
    return Score(output.prompt, output.prompt_token_ids, logprobs, target, ranks)
