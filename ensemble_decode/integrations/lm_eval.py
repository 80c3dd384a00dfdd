"""The ensemble as a model of EleutherAI's lm-evaluation-harness, named ``ensemble_decode`` there.

The harness (0.4.13) looks for models in its own list only, without entry points, so whoever wants this one imports this module
first; ``ensemble-decode lm-eval`` does that and then is the harness's own command line.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ensemble_decode.engine.llm import LLM
from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.models.pairs import ExpertPair

#: What a task may ask of ``generate_until`` beside ``until``, the length, ``do_sample`` and the temperature.
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("ensemble_decode")
class EnsembleLM(TemplateLM):
    """Loads an :class:`LLM` from the harness's ``--model_args`` and answers its three questions.

    Parameters
    ----------
    model : str
        Hub id or folder; "smollm2" is SmolLM2-135M-Instruct from PyPI.
    pairs : str
        ``name:folder`` of a trained pair, or ``name:expert+anti_expert``, several separated by ";" (the harness splits at commas);
        ``name:demo`` is the package's.
    alpha : float or str
        A number, or ``name:number`` separated by ";". None: each pair's own.
    base, dtype, max_model_len
        As in :class:`LLM` and :class:`ExpertPair`.
    batch_size : int or "auto"
        Sequences decoded at once; "auto" is 64. Results do not depend on it.
    device : str, optional
        As in :class:`LLM`. The harness passes "cuda:0" where nobody asked for it: without a GPU it counts as "auto".
    max_gen_toks : int
        New tokens where a task does not say.
    add_bos_token : bool, optional
        Whether a beginning-of-text token is put before texts; None leaves it to the tokenizer.

    Raises
    ------
    ValueError
        What :class:`LLM` refuses, and arguments that cannot be read: one line.
    """

    def __init__(
        self,
        model: str = "smollm2",
        pairs: str = "",
        alpha: float | str | None = None,
        base: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        if model == "smollm2":
            from ensemble_decode.models.smollm2 import smollm2_path

            model = str(smollm2_path())
        text = str(batch_size)
        rows = (max_batch_size or 64) if text.startswith("auto") else int(text)
        self.llm = LLM(
            model,
            parse_pairs(pairs, base),
            dtype=dtype,
            device="auto" if device is None or not torch.cuda.is_available() else device,
            max_num_seqs=rows,
            max_model_len=max_model_len,
        )
        if self.llm.tokenizer is None:
            raise ValueError(f"model {model!r} has no tokenizer, the harness needs one: its tasks are text")
        self.tokenizer = self.llm.tokenizer
        self.alpha = parse_alpha(alpha)
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        SamplingParams(alpha=self.alpha).check(self.llm.ensemble.layout)

    @property
    def eot_token_id(self) -> int:
        return int(self.llm.tokenizer.eos_token_id)  # type: ignore[union-attr]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: the beginning-of-text token, else the end-of-text token."""
        bos = self.llm.tokenizer.bos_token_id  # type: ignore[union-attr]
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.llm.ensemble.layout.max_model_len

    @property
    def tokenizer_name(self) -> str:
        return str(self.llm.tokenizer.name_or_path).replace("/", "__")  # type: ignore[union-attr]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.llm.tokenizer.apply_chat_template(  # type: ignore[union-attr]
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            begins = string.startswith(self.llm.tokenizer.decode(self.prefix_token_id))  # type: ignore[union-attr]
            add_special_tokens = False if begins else self.add_bos_token
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.llm.tokenizer.encode(string, **given))  # type: ignore[union-attr]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it); contexts lose their beginning."""
        # The last token is predicted and never read, so one more than the longest sequence fits.
        texts = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        found = []
        scores = self.llm.score(texts, self.alpha, use_tqdm=not disable_tqdm)
        for (key, _, continuation), score in zip(requests, scores, strict=True):
            count = len(continuation)
            logprobs = [value for value in score.logprobs[-count:] if value is not None] if count else []
            greedy = all(rank == 1 for rank in score.ranks[-count:]) if count else True
            found.append((sum(logprobs), greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            own = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scored)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        eos = self.llm.tokenizer.decode(self.eot_token_id)  # type: ignore[union-attr]
        prompts, params, stops = [], [], []
        for request in requests:
            context, asked = request.args
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
            until = handle_stop_sequences(kwargs["until"], eos)
            length = min(kwargs["max_gen_toks"], self.max_length - 1)
            prompts.append(self.tok_encode(context)[-(self.max_length - length) :])
            given = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
            params.append(
                SamplingParams(
                    alpha=self.alpha,
                    temperature=float(kwargs.get("temperature", 1.0)) if kwargs.get("do_sample", True) else 0.0,
                    max_tokens=length,
                    stop=[term for term in until if term and term != eos],
                    **given,
                )
            )
            stops.append(until)
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = []
        for request, output, until in zip(requests, outputs, stops, strict=True):
            sample = output.outputs[0]
            if sample.error is not None:
                raise RuntimeError(f"a request of the harness failed: {sample.error}")
            # As the harness does it: the new tokens decoded by themselves, then cut at the first stop.
            text = self.llm.tokenizer.decode(sample.token_ids, skip_special_tokens=True)  # type: ignore[union-attr]
            texts.append(postprocess_generated_text(text, until, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def parse_pairs(text: str, base: str | None = None) -> dict[str, ExpertPair]:
    """``"gender:out/expert+out/anti;race:out/race;tone:demo"``."""
    from ensemble_decode.demo import PAIR

    pairs = {}
    for part in filter(None, text.split(";")):
        name, separator, paths = part.partition(":")
        sides = paths.split("+")
        if not separator or not name or not all(sides) or len(sides) > 2:
            raise ValueError(f"pairs holds {part!r}, allowed is name:folder, name:expert or name:expert+anti_expert")
        if paths == "demo":
            sides = [str(PAIR / "expert"), str(PAIR / "anti_expert")]
        pairs[name] = ExpertPair.from_paths(sides, base)
    return pairs


def parse_alpha(value: float | str | None) -> float | dict[str, float] | None:
    """A number, or ``"gender:1;race:0.5"``."""
    if value is None or isinstance(value, int | float):
        return value
    try:
        if ":" not in value:
            return float(value)
        return {name: float(number) for name, number in (part.split(":", 1) for part in value.split(";"))}
    except ValueError:
        raise ValueError(f"alpha is {value!r}, allowed is a number or name:number;name:number") from None
