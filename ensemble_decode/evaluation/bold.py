"""Continuations of BOLD's prompts (Dhamala et al. 2021), generated once and kept for every metric that reads them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ensemble_decode.corpora.source import Source, find
from ensemble_decode.engine.beam_search import BeamSearchParams
from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.evaluation.metric import System

#: The groups that arXiv 2412.01711 compares: domain → (file, groups).
DOMAINS = {
    "gender": ("gender_prompt.json", ("American_actors", "American_actresses")),
    "race": ("race_prompt.json", ("African_Americans", "European_Americans")),
    "religion": ("religious_ideology_prompt.json", ("judaism", "christianity", "islam")),
}
#: Further domains, of which four groups each; not in the paper.
MORE_DOMAINS = {
    "profession": (
        "profession_prompt.json",
        ("engineering_branches", "nursing_specialties", "corporate_titles", "dance_occupations"),
    ),
    "political_ideology": (
        "political_ideology_prompt.json",
        ("left-wing", "right-wing", "socialism", "conservatism"),
    ),
}
_KNOWN = DOMAINS | MORE_DOMAINS
_SOURCE = Source("BOLD", "https://github.com/amazon-science/bold", "CC BY-SA 4.0")
_PROBE = "The weather on that day was"


@dataclass(frozen=True, slots=True)
class BoldPrompt:
    """The beginning of a Wikipedia sentence about somebody; ``id`` is its place in BOLD and holds no text."""

    id: str
    domain: str
    group: str
    entity: str
    text: str

    @property
    def digest(self) -> str:
        """Of the text: other data may have another text in the same place."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def paper_params(alpha: float | dict[str, float] | None = None) -> SamplingParams:
    """How arXiv 2412.01711 samples: top-p 0.9 at temperature 1, 15 new tokens, 5 samples a prompt."""
    return SamplingParams(alpha=alpha, temperature=1.0, top_p=0.9, max_tokens=15, n=5)


def read_prompts(data: Path, domains: Sequence[str] = tuple(DOMAINS)) -> list[BoldPrompt]:
    """BOLD's prompts of the paper's groups, stripped. The one prompt that is empty then is left out.

    Parameters
    ----------
    data : Path
        The folder that holds ``bold/prompts``.
    domains : sequence of str
        Of "gender", "race", "religion", and those of :data:`MORE_DOMAINS`.

    Raises
    ------
    FileNotFoundError
        A file is missing, and where to get it.
    ValueError
        An unknown domain.
    """
    prompts = []
    for domain in domains:
        if domain not in _KNOWN:
            raise ValueError(f"domain is {domain!r}, allowed are {', '.join(map(repr, _KNOWN))}")
        name, groups = _KNOWN[domain]
        path = find(_SOURCE, data, f"bold/prompts/{name}", f"prompts/{name}", name)
        corpus = json.loads(path.read_text(encoding="utf-8"))
        for group in groups:
            for e, (entity, texts) in enumerate(corpus[group].items()):
                for t, text in enumerate(texts):
                    if text.strip():
                        prompts.append(BoldPrompt(f"{domain}/{group}/{e}/{t}", domain, group, entity, text.strip()))
    return prompts


def mask_entity(text: str, entity: str) -> str:
    """The text with the entity's name replaced by XYZ, as the regard classifier was trained."""
    name = " ".join(entity.split("_"))
    return re.sub(re.escape(name), "XYZ", text, flags=re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Continuations:
    """Samples of a system, kept in a folder: interrupted, it goes on where it stopped; asked again, it reads.

    Parameters
    ----------
    folder : str
        One JSON-lines file for each system and way of sampling. It holds generated text and is not for publishing.
    domains : tuple of str
    samples, max_tokens : int
        Of each prompt. Filters, temperature and α are those of the system's ``params``.
    seed : int
        Each prompt has a seed of its own, made of this one and the prompt's id. So systems see the same noise, which
        makes paired comparisons sharper, and a prompt's samples don't depend on which others are asked for.
    chunk : int
        Prompts between two writes.
    prompts : int, optional
        Of each group, drawn by the digest of their ids; None: all.
    """

    folder: str
    domains: tuple[str, ...] = tuple(DOMAINS)
    samples: int = 5
    max_tokens: int = 15
    seed: int = 0
    chunk: int = 64
    prompts: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "chunk", "prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}, allowed is 1 or more")

    def check(self, data: Path) -> None:
        """Read the prompts."""
        read_prompts(data, self.domains)

    def of(self, system: System, data: Path, limit: int | None = None) -> list[tuple[BoldPrompt, list[str]]]:
        """Each prompt with its ``samples`` continuations; ``limit`` takes the first prompts of each group."""
        prompts = _first(self._drawn(read_prompts(data, self.domains)), limit)
        path = self.path(system)
        known = _read(path)
        missing = [prompt for prompt in prompts if (prompt.id, prompt.digest) not in known]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file, tqdm(total=len(missing), desc=system.name, unit="prompt") as bar:
            for start in range(0, len(missing), self.chunk):
                part = missing[start : start + self.chunk]
                for prompt, texts in zip(part, self._continue(system, part), strict=True):
                    known[prompt.id, prompt.digest] = texts
                    line = {"id": prompt.id, "prompt": prompt.digest, "samples": texts}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(part))
        return [(prompt, known[prompt.id, prompt.digest]) for prompt in prompts]

    def beams(self, system: System) -> BeamSearchParams | None:
        """How the system searches, None if it samples; ValueError if it has fewer beams than ``samples``."""
        width = system.beam_width
        if width is None:
            return None
        if width < self.samples:
            raise ValueError(
                f"beam_width of {system.name!r} is {width}, allowed is {self.samples} (the samples) or more"
            )
        return BeamSearchParams(beam_width=width, max_tokens=self.max_tokens, alpha=system.params.alpha)

    def path(self, system: System) -> Path:
        """The file of a system. Its name tells apart parameters, prefix, and models, by what they make of a sentence and their length."""
        score = system.llm.score(_PROBE, alpha=system.params.alpha)[0]
        logprobs = [None if value is None else round(value, 4) for value in score.logprobs]
        params = asdict(replace(system.params, n=self.samples, max_tokens=self.max_tokens, seed=self.seed))
        if system.beam_width is not None:
            params["beam_width"] = system.beam_width
        longest = system.llm.ensemble.layout.max_model_len  # where a text ends that is longer
        key = json.dumps([system.prefix, params, score.token_ids, logprobs, longest], sort_keys=True)
        name = re.sub(r"[^\w.=-]+", "_", system.name)
        return Path(self.folder) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"

    def _drawn(self, prompts: list[BoldPrompt]) -> list[BoldPrompt]:
        """``prompts`` of each group, in BOLD's order; more of them contain fewer of them."""
        if self.prompts is None:
            return prompts
        order = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())
        chosen = {prompt.id for prompt in _first(order, self.prompts)}
        return [prompt for prompt in prompts if prompt.id in chosen]

    def _continue(self, system: System, prompts: Sequence[BoldPrompt]) -> Iterator[list[str]]:
        """The samples of each prompt, or its best beams."""
        texts = [system.prefix + prompt.text for prompt in prompts]
        beams = self.beams(system)
        if beams is None:
            outputs = system.llm.generate(texts, [self._params(system, p) for p in prompts], use_tqdm=False)
            found = [([s.text for s in o.outputs], [s.error for s in o.outputs]) for o in outputs]
        else:
            searched = system.llm.beam_search(texts, beams, use_tqdm=False)
            found = [([s.text or "" for s in o.sequences[: self.samples]], [o.error]) for o in searched]
        for prompt, (samples, errors) in zip(prompts, found, strict=True):
            for error in errors:
                if error is not None:
                    raise ValueError(f"BOLD prompt {prompt.id!r} of {system.name!r} failed: {error}")
            yield samples

    def _params(self, system: System, prompt: BoldPrompt) -> SamplingParams:
        digest = hashlib.sha256(f"{self.seed}:{prompt.id}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little", signed=True)
        return replace(system.params, n=self.samples, max_tokens=self.max_tokens, seed=seed)


def full_text(prompt: BoldPrompt, continuation: str) -> str:
    """What the classifiers read: prompt and continuation. A trigger before the prompt is not part of it."""
    return prompt.text + continuation


def _first(prompts: list[BoldPrompt], limit: int | None) -> list[BoldPrompt]:
    if limit is None:
        return prompts
    seen: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        seen[prompt.group] = seen.get(prompt.group, 0) + 1
        if seen[prompt.group] <= limit:
            chosen.append(prompt)
    return chosen


def _read(path: Path) -> dict[tuple[str, str | None], list[str]]:
    """Samples by prompt id and digest, which old lines lack: whose prompts they continue isn't known.

    A last line that a kill cut short is cut off the file, so that what follows stays whole.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
    return {(line["id"], line.get("prompt")): line["samples"] for line in lines}
