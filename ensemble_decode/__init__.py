"""Steer a language model while it decodes: softmax(z + Σ α(z⁺ − z⁻)), fast and inspectable."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble_decode.engine.async_llm import AsyncLLM as AsyncLLM
    from ensemble_decode.engine.beam_search import BeamSearchOutput as BeamSearchOutput
    from ensemble_decode.engine.beam_search import BeamSearchParams as BeamSearchParams
    from ensemble_decode.engine.beam_search import BeamSearchSequence as BeamSearchSequence
    from ensemble_decode.engine.llm import LLM as LLM
    from ensemble_decode.engine.outputs import CompletionOutput as CompletionOutput
    from ensemble_decode.engine.outputs import Logprob as Logprob
    from ensemble_decode.engine.outputs import RequestOutput as RequestOutput
    from ensemble_decode.engine.outputs import Score as Score
    from ensemble_decode.engine.params import SamplingParams as SamplingParams
    from ensemble_decode.engine.speculation import Speculation as Speculation
    from ensemble_decode.models.pairs import ExpertPair as ExpertPair

__version__ = "0.1.0"

# Imported at first use: `ensemble-decode --help` and `ensemble_decode.ops` need no transformers.
_HOMES = {
    "LLM": "engine.llm",
    "AsyncLLM": "engine.async_llm",
    "ExpertPair": "models.pairs",
    "BeamSearchParams": "engine.beam_search",
    "BeamSearchOutput": "engine.beam_search",
    "BeamSearchSequence": "engine.beam_search",
    "SamplingParams": "engine.params",
    "RequestOutput": "engine.outputs",
    "CompletionOutput": "engine.outputs",
    "Logprob": "engine.outputs",
    "Score": "engine.outputs",
    "Speculation": "engine.speculation",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "ExpertPair",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "Speculation",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
