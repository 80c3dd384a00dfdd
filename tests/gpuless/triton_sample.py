"""The sampling operator's Triton kernels on the CPU: launched by the checking interpreter, or with a bug planted."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ensemble_decode.kernels import ensemble_sample as kernels
from ensemble_decode.ops import EnsembleSample

from ..ops.sampling_cases import Case
from .interp import Traffic, nothing_written, run

HOPPER = (9, 0)
LOGITS = ("target", "expert", "anti")


def launches(case: Case, *, one_launch: bool | None = None, module: Any = kernels, **more: Any) -> tuple[list, tuple]:
    """What ``plan`` says for a case."""
    return module.plan(
        *case.logits,
        case.alpha,
        case.temperature,
        case.top_k,
        case.top_p,
        case.min_p,
        case.seed,
        case.position,
        case.nucleus == "target",
        case.target_is_combined,
        **{"capability": HOPPER, "one_launch": one_launch, **more},
    )


@dataclass
class Interpreted:
    """An operator for ``Case.run`` that interprets the launches, and keeps what each of them moved."""

    one_launch: bool
    schedule: str = "sequential"
    order_seed: int = 0
    races: bool = False
    module: Any = kernels
    traffic: list[Traffic] = field(default_factory=list)

    def sample(self, case: Case) -> EnsembleSample:
        plan, results = launches(case, one_launch=self.one_launch, module=self.module)
        self.traffic = []
        # What the first launch of two leaves for the second is not there before.
        scratch = [plan[0].arguments[x] for x in ("workspace", "ticket") if x in plan[0].arguments]
        written = nothing_written(*results, *scratch)
        for launch in plan:
            self.traffic.append(
                run(
                    launch.kernel,
                    launch.grid,
                    schedule=self.schedule,
                    order_seed=self.order_seed,
                    races=self.races,
                    uninitialised=written,
                    **launch.arguments,
                    **launch.options,
                )
            )
        return EnsembleSample(*results)

    @property
    def logits_read(self) -> Counter[str]:
        """Bytes read of each logits tensor, over all launches."""
        total: Counter[str] = Counter()
        for traffic in self.traffic:
            total.update({name: traffic.read[name] for name in LOGITS})
        return total


def with_bug(folder: Path, right: str, wrong: str, file: str = "ensemble_sample") -> ModuleType:
    """The kernels' module with one expression replaced, in ``ensemble_sample.py`` or in a module that it imports."""
    source_folder = Path(kernels.__file__).parent
    names = {"ensemble_sample", file}
    for name in names:
        text = (source_folder / f"{name}.py").read_text().replace("from .", "from ensemble_decode.kernels.")
        if name == file:
            assert right in text, f"{file}.py has no {right!r} to replace"
            text = text.replace(right, wrong)
        elif file != "ensemble_sample":
            text = text.replace(f"ensemble_decode.kernels.{file} import", f"planted_{file} import")
        (folder / f"planted_{name}.py").write_text(text)
    try:
        for name in sorted(names, key=lambda name: name == "ensemble_sample"):
            spec = importlib.util.spec_from_file_location(f"planted_{name}", folder / f"planted_{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module
    finally:
        for name in names:
            sys.modules.pop(f"planted_{name}", None)
