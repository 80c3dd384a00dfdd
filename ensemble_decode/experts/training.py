"""Training an expert pair with transformers' ``Trainer``: early stopping on validation NLL, resumed after a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from ensemble_decode.experts import card
from ensemble_decode.experts.texts import PairTexts, split
from ensemble_decode.models.loading import check_checkpoint, load_config

SIDES = ("expert", "anti_expert")
IGNORED = -100


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How both sides are trained; equal for both, so that only their texts differ.

    ``rank`` 0 is full fine-tuning. ``patience`` counts evaluations without a lower validation NLL.
    """

    rank: int = 8
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 5e-4
    max_length: int = 64
    evaluate_every: int = 10
    patience: int = 3
    validation: float = 0.1
    seed: int = 0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        low = {"rank": 0, "steps": 1, "batch_size": 1, "max_length": 2, "evaluate_every": 1, "patience": 1, "seed": 0}
        for name, least in low.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, an integer of at least {least} is allowed")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate!r}, a number above 0 is allowed")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha!r}, a finite number is allowed")
        if not 0 < self.validation <= 0.5:
            raise ValueError(f"validation is {self.validation!r}, above 0 and at most 0.5 is allowed")


def train_pair(
    model: str,
    texts: PairTexts,
    out: str | os.PathLike[str],
    settings: TrainingSettings,
    *,
    base_name: str | None = None,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Path:
    """Train both sides and write the pair's folder; the same call again goes on where a killed one stopped.

    Parameters
    ----------
    model : str
        Hub id or folder of the model that both sides start from.
    base_name : str, optional
        Its name in the adapters and the card (default: ``model``).

    Returns
    -------
    Path
        ``out``, with ``expert/``, ``anti_expert/``, ``pair.json`` (written last), ``README.md`` and ``curve.png``.

    Raises
    ------
    ValueError
        If ``out`` is a finished pair, holds something else, or was begun with other settings or texts; if the model can't be
        loaded, or its weights are pickled.
    """
    check_checkpoint(model)
    load_config(model)  # a hub id that isn't there
    out = Path(out)
    parts = split(texts, settings.validation, settings.seed)
    work = out / ".training"
    _begin(out, work, model, texts, settings)
    results = {}
    for side in SIDES:
        done = work / f"{side}.json"
        if not done.is_file():
            result = _train_side(model, base_name or model, parts[side], work / side, out / side, settings, progress)
            _write_json(done, result)
        results[side] = json.loads(done.read_text(encoding="utf-8"))
        r = results[side]
        say(
            f"{side}: validation NLL {r['nll_before']:.3f} → {r['nll_after']:.3f} nats a token at step "
            f"{r['best_step']} of {r['steps']} ({r['train_texts']} texts, {r['validation_texts']} validate)"
        )
    card.draw_curves(results, out / "curve.png")
    card.write_card(out / "README.md", base_name or model, texts, settings, results)
    _write_json(
        out / "pair.json",
        {
            "format": 1,
            "base_model": base_name or model,
            "kind": "lora" if settings.rank else "full",
            "axis": texts.axis,
            "alpha": settings.alpha,
            "data": texts.name,
            "texts": card.digest(texts),
            "unfit": list(texts.unfit),
            "licence": texts.licence,
            "settings": asdict(settings),
            "results": {side: {k: v for k, v in r.items() if k != "history"} for side, r in results.items()},
        },
    )
    shutil.rmtree(work)
    return out


def mean_nll(model: Any, rows: Sequence[dict[str, list[int]]], batch_size: int, pad: int) -> float:
    """Mean negative log-probability, in nats, of every token after each text's first."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(model.device) for k, v in collate(rows[start : start + batch_size], pad).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
            count += int((labels != IGNORED).sum())
    model.train(was_training)
    return total / count


def collate(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]``."""
    width = max(len(row["input_ids"]) for row in rows)
    filled: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids = row["input_ids"]
        gap = width - len(ids)
        filled["input_ids"].append(ids + [pad] * gap)
        filled["attention_mask"].append([1] * len(ids) + [0] * gap)
        filled["labels"].append(ids + [IGNORED] * gap)
    return {name: torch.tensor(values) for name, values in filled.items()}


class _NllTrainer(Trainer):
    """Validates with :func:`mean_nll`: the Trainer's own loss is a mean of batches, not of tokens."""

    def __init__(self, *args: Any, pad: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pad = pad

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        rows: Any = self.eval_dataset
        metrics = {"eval_nll": mean_nll(self.model, rows, self.args.per_device_eval_batch_size, self._pad)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def resume(self, checkpoint: str | None) -> None:
        """Train from a checkpoint, or from the start where there is none.

        ``train`` forgets that a checkpoint was the last one (``on_train_begin`` resets ``should_training_stop``) and would go
        on from it: of such a one only the best weights are loaded, as at the end of training.
        """
        if checkpoint is not None:
            last = Path(checkpoint)
            state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
                best = last.with_name(f"checkpoint-{state.best_global_step}") if state.best_global_step else last
                state.best_model_checkpoint = str(best)
                self.state = state
                self._load_best_model()
                return
        self.train(resume_from_checkpoint=checkpoint)


def _train_side(
    model_path: str,
    base_name: str,
    part: tuple[list[str], list[str]],
    work: Path,
    out: Path,
    settings: TrainingSettings,
    progress: bool,
) -> dict[str, Any]:
    start = time.perf_counter()
    set_seed(settings.seed)  # both sides begin with the same weights and see their texts in the same order
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model_path!r} can't be loaded: {str(error).strip().splitlines()[0]}") from None
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    train, validation = (_encode(tokenizer, texts, settings.max_length) for texts in part)
    if settings.rank:
        model = _with_lora(model, base_name, settings.rank)
    before = mean_nll(model, validation, settings.batch_size, pad)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=min(10, settings.steps // 10),
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        logging_steps=settings.evaluate_every,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=[],
        disable_tqdm=not progress,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = _NllTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=lambda rows: collate(rows, pad),
        callbacks=[EarlyStoppingCallback(settings.patience)],
        pad=pad,
    )
    trainer.remove_callback(PrinterCallback)  # the curve says it better than a dict a line
    trainer.resume(last_checkpoint(work))
    after = mean_nll(trainer.model, validation, settings.batch_size, pad)
    _publish(trainer.model, tokenizer, out, bool(settings.rank))
    history = [h for h in trainer.state.log_history if "eval_nll" in h or "loss" in h]
    return {
        "nll_before": before,
        "nll_after": after,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step or 0,
        "train_texts": len(train),
        "validation_texts": len(validation),
        "seconds_of_last_run": round(time.perf_counter() - start, 1),
        "history": [{k: h[k] for k in ("step", "loss", "eval_nll") if k in h} for h in history],
    }


def last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint; half-written ones, which a kill leaves, are removed."""
    found = []
    for folder in work.glob("checkpoint-*"):
        try:  # the Trainer writes its state last
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            found.append((int(folder.name.split("-")[1]), str(folder)))
        except (OSError, ValueError):
            shutil.rmtree(folder)
    return max(found)[1] if found else None


def _with_lora(model: Any, base_name: str, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError(
            "LoRA needs peft: pip install 'ensemble_decode[train]', or --rank 0 for full training"
        ) from None
    # Every linear but the head: with embeddings and head frozen the sides combine before one head product.
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]:
    rows = [{"input_ids": tokenizer(text)["input_ids"][:max_length]} for text in texts]
    kept = [row for row in rows if len(row["input_ids"]) > 1]
    if not kept:
        raise ValueError("no text has 2 tokens or more, longer texts are needed")
    return kept


def _publish(model: Any, tokenizer: Any, out: Path, adapter: bool) -> None:
    """The folder appears whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    for folder in (partial, out):
        shutil.rmtree(folder, ignore_errors=True)
    if adapter:
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    else:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    partial.rename(out)


def _begin(out: Path, work: Path, model: str, texts: PairTexts, settings: TrainingSettings) -> None:
    if (out / "pair.json").exists():
        raise ValueError(f"{str(out)!r} is a finished pair, name a new folder or remove it")
    digest = card.digest(texts)
    asked = json.loads(json.dumps({"model": str(model), "texts": digest, **asdict(settings)}))
    file = work / "settings.json"
    if file.is_file():
        begun = json.loads(file.read_text(encoding="utf-8"))
        if begun != asked:
            changed = ", ".join(k for k in asked if begun.get(k) != asked[k])
            raise ValueError(
                f"{str(out)!r} was begun with another {changed}, resume with the same or name a new folder"
            )
        return
    if out.exists() and any(p.name != ".training" for p in out.iterdir()):
        raise ValueError(f"{str(out)!r} is not empty, a new folder is needed")
    work.mkdir(parents=True, exist_ok=True)
    _write_json(file, asked)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
