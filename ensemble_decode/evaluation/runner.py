"""Run metrics on systems and keep what is done: one file of records a task, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ensemble_decode.evaluation.metric import Figure, Metric, Record, System

Results = dict[str, dict[str, dict[str, Figure]]]


@dataclass(frozen=True, slots=True)
class Task:
    """A metric on a system, and everything that its records depend on."""

    system: System
    metric: Metric
    depends_on: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of what the records depend on. Systems that differ only in what a metric doesn't read share its records."""
        return hashlib.sha256(json.dumps(self.depends_on, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, folder: Path) -> Path:
        """Where the records are, or go: the name is for people, then the digest."""
        kept = sorted(folder.glob(f"*_{self.digest}.json"))
        if kept:
            return kept[0]
        readable = "".join(c if c.isalnum() or c in "-._" else "_" for c in f"{self.metric.name}_{self.system.name}")
        return folder / f"{readable}_{self.digest}.json"


def make_tasks(
    systems: Sequence[System], metrics: Sequence[Metric], model: Mapping[str, Any], data: Path, limit: int | None
) -> list[Task]:
    """Every metric on every system. ``model`` identifies the weights: see :func:`fingerprint`."""
    tasks = []
    for system in systems:
        alpha = _alpha(system)
        sampling = {k: v for k, v in asdict(system.params).items() if k != "stops"} | {"alpha": alpha}
        if system.beam_width is not None:
            sampling["beam_width"] = system.beam_width
        for metric in metrics:
            decoding = sampling if metric.generates else {"alpha": alpha}
            settings = {"metric": metric.name, **asdict(metric)}  # type: ignore[call-overload]
            depends_on: dict[str, Any] = {
                "model": dict(model),
                "system": decoding,
                "prefix": system.prefix,
                "settings": settings,
            }
            depends_on |= {"data": str(data.resolve()), "limit": limit}
            tasks.append(Task(system, metric, depends_on))
    return tasks


def _alpha(system: System) -> float | dict[str, float] | None:
    """The system's α; those of the pairs by name where it is left to them, for a pair's own may change."""
    if system.params.alpha is not None:
        return system.params.alpha
    layout = system.llm.ensemble.layout
    return {layout.pairs[index].name: alpha for index, alpha in system.params.alphas(layout).items()}


def run_tasks(
    tasks: Sequence[Task], data: Path, out: Path, limit: int | None = None, say: Callable[[str], None] = print
) -> Results:
    """Figures by system and metric. A task whose records are in ``out`` is not run again.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C; the tasks that were done stay on disk, and the next run goes on from them.
    FileNotFoundError
        Data that a metric needs is missing, with where to get it.
    """
    folder = out / "records"
    folder.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    for number, task in enumerate(tasks, 1):
        path = task.path(folder)
        label = f"[{number}/{len(tasks)}] {task.system.name}: {task.metric.name}"
        records: list[Record]
        if path.is_file():
            say(f"{label} (kept)")
            records = json.loads(path.read_text(encoding="utf-8"))["records"]
        else:
            say(label)
            records = task.metric.run(task.system, data, limit)
            # A figure must not depend on whether its records have been through a file.
            kept = dump({"depends_on": task.depends_on, "records": records})
            write(path, kept)
            records = json.loads(kept)["records"]
        results.setdefault(task.system.name, {})[task.metric.name] = task.metric.summarise(records)
    return results


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Digest of a model's or an adapter's weights and configuration; a hub id stands for itself."""
    path = Path(folder)
    if not path.is_dir():
        return str(folder)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".model", ".txt"):
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def dump(value: Any) -> str:
    """JSON whose bytes depend on the values alone. NaN is refused: it isn't JSON."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: Path, text: str) -> None:
    """Put a file there whole, by a rename: a killed run leaves no half of one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
