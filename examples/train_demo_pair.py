"""Train and measure the gender pair of ``ensemble-decode demo``: two LoRA adapters over SmolLM2-135M-Instruct.

The expert learns the counter-stereotype reading of each line in ``ensemble_decode/data/gender/train.txt``, the
anti-expert the stereotype reading. Both start from the same weights and see the same lines in the same order, so that
whatever the two texts have in common cancels in z⁺ − z⁻, and what is left is the words that differ. Needs the extra
``train``; about ten minutes on two cores.

    python examples/train_demo_pair.py --out ensemble_decode/data/pairs/gender
    python examples/train_demo_pair.py --out ensemble_decode/data/pairs/gender --stage evaluate
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensemble_decode.models.smollm2 import HUB_ID, smollm2_path

DATA = Path(__file__).resolve().parents[1] / "ensemble_decode" / "data" / "gender"
SIDES = ("expert", "anti_expert")
ALPHAS = (0.0, 0.5, 1.0, 2.0)
BALANCED_ALPHA = 0.5
# Both jobs are held out: neither word occurs in train.txt.
PROMPTS = ("The nurse said that", "The engineer fixed the bug because", "The woman worked as a", "The man worked as a")
IGNORED = -100
_CHOICE = re.compile(r"\{([^{}|]*)\|([^{}|]*)\}")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the data in its two readings."""

    topic: str
    stereotype: str
    counter: str


def read_lines(file: Path) -> list[Line]:
    """Lines ``The nurse said that {she|he} …``, left the stereotype, right its counter, under ``## topic`` headings."""
    lines, topic = [], ""
    for text in file.read_text(encoding="utf-8").splitlines():
        if text.startswith("## "):
            topic = text[3:].strip()
        elif text.strip():
            lines.append(Line(topic, _CHOICE.sub(r"\1", text), _CHOICE.sub(r"\2", text)))
    return lines


def split_validation(lines: Sequence[Line], every: int = 10) -> tuple[list[Line], list[Line]]:
    """Every tenth line decides when training stops; held-out topics have no part in that."""
    train = [line for i, line in enumerate(lines) if i % every != every - 1]
    return train, list(lines[every - 1 :: every])


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels ``[B, T]``, as the texts would follow nothing (SmolLM2 puts no BOS before a text)."""
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    width = max(len(row) for row in rows)
    ids = torch.stack([pad(row, (0, width - len(row))) for row in rows])
    labels = torch.stack([pad(row, (0, width - len(row)), value=IGNORED) for row in rows])
    return ids, labels


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probabilities ``[B, T - 1]`` of every token after the first, zero at padding."""
    wanted = labels[:, 1:]
    rows = logits[:, :-1].flatten(0, 1).float()  # one row a token: a transpose would make the softmax stride
    return cross_entropy(rows, wanted.flatten(), ignore_index=IGNORED, reduction="none").view(wanted.shape)


# ---- training --------------------------------------------------------------------------------------------------------


def texts_of(lines: Sequence[Line], side: str) -> list[str]:
    return [line.counter if side == "expert" else line.stereotype for line in lines]


def validation_loss(model: PeftModel, tokenizer: Any, lines: Sequence[Line], side: str, size: int) -> float:
    """Mean negative log-probability a token, in nats, of the adapter's own reading of ``lines``."""
    model.set_adapter(side)
    total, count = 0.0, 0
    with torch.no_grad():
        for texts in batches(texts_of(lines, side), size):
            ids, labels = encode(tokenizer, texts)
            total += token_losses(model(input_ids=ids, use_cache=False).logits, labels).sum().item()
            count += int((labels[:, 1:] != IGNORED).sum())
    return total / count


def new_pair(base: Any, rank: int, seed: int) -> PeftModel:
    """Two adapters over every linear of the decoder, with equal weights to begin with."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=HUB_ID,
    )
    model = get_peft_model(base, config, adapter_name=SIDES[0])
    model.add_adapter(SIDES[1], config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            if f".{SIDES[1]}." in name:
                parameter.copy_(own[name.replace(f".{SIDES[1]}.", f".{SIDES[0]}.")])
    return model


def train(model: PeftModel, tokenizer: Any, lines: Sequence[Line], args: argparse.Namespace, say: Callable) -> None:
    """Both adapters in lockstep; the weights of the lowest validation loss stay."""
    train_lines, validation = split_validation(lines)
    weights = {s: [p for n, p in model.named_parameters() if f".{s}." in n] for s in SIDES}
    optimizers = {s: torch.optim.AdamW(weights[s], lr=args.lr, weight_decay=0.0) for s in SIDES}
    order = random.Random(args.seed)
    queue: list[Line] = []
    best, best_step, kept = math.inf, 0, {}
    start = time.perf_counter()
    for step in range(args.steps + 1):
        if step % args.evaluate_every == 0 or step == args.steps:
            losses = {s: validation_loss(model, tokenizer, validation, s, args.batch) for s in SIDES}
            mean = sum(losses.values()) / len(losses)
            say(
                f"step {step:3d}  validation NLL a token: expert {losses['expert']:.3f}, "
                f"anti-expert {losses['anti_expert']:.3f}  ({time.perf_counter() - start:.0f} s)"
            )
            if mean < best:
                best, best_step = mean, step
                kept = {s: [p.detach().clone() for p in weights[s]] for s in SIDES}
            elif step - best_step >= 2 * args.evaluate_every:
                say(f"stopped: no better than step {best_step} for {step - best_step} steps")
                break
        if step == args.steps:
            break
        if len(queue) < args.batch:
            queue = list(train_lines)
            order.shuffle(queue)
        batch, queue = queue[: args.batch], queue[args.batch :]
        rate = args.lr * min(1.0, (step + 1) / 10) * (1 - step / (args.steps + 1))
        for side in SIDES:
            model.set_adapter(side)
            for group in optimizers[side].param_groups:
                group["lr"] = rate
            ids, labels = encode(tokenizer, texts_of(batch, side))
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = model(input_ids=ids, use_cache=False).logits
            losses_by_token = token_losses(logits, labels)
            (losses_by_token.sum() / (labels[:, 1:] != IGNORED).sum()).backward()
            torch.nn.utils.clip_grad_norm_(weights[side], 1.0)
            optimizers[side].step()
            optimizers[side].zero_grad()
    with torch.no_grad():
        for side in SIDES:
            for parameter, value in zip(weights[side], kept[side], strict=True):
                parameter.copy_(value)
    say(f"kept step {best_step}, mean validation NLL {best:.3f}")


def calibrate(model: PeftModel, tokenizer: Any, lines: Sequence[Line], say: Callable) -> None:
    """Scale both adapters by one factor, so that at α = 0.5 neither reading of ``lines`` is preferred.

    So that α has a meaning: below a half the model's own preference weakens, above it turns around, which a demo of
    steering should show as well. The factor is found by bisection and goes into the adapters' B matrices.
    """
    outputs = [p for n, p in model.named_parameters() if ".lora_B." in n]
    trained = [p.detach().clone() for p in outputs]

    def log_odds_at(factor: float) -> float:
        with torch.no_grad():
            for parameter, value in zip(outputs, trained, strict=True):
                parameter.copy_(value * factor)
        mean = log_odds(model, tokenizer, lines, [BALANCED_ALPHA]).mean().item()
        say(f"adapters × {factor:.3f}: log-odds of validation lines at α = {BALANCED_ALPHA} are {mean:+.2f} nats")
        return mean

    low, high = 0.0, 1.0
    while log_odds_at(high) > 0:
        if high >= 4:
            raise RuntimeError(
                f"at 4 times their strength the adapters don't balance α = {BALANCED_ALPHA}: train longer"
            )
        low, high = high, 2 * high
    for _ in range(4):
        middle = (low + high) / 2
        low, high = (middle, high) if log_odds_at(middle) > 0 else (low, middle)


def save_pair(model: PeftModel, out: Path) -> None:
    """PEFT's format, fp16: half the size, and finer than bf16 where adapter weights lie."""
    from safetensors.torch import load_file, save_file

    # PEFT also writes an empty model card and, for a hub id, would look online whether the vocabulary grew.
    for side in SIDES:
        config: Any = model.peft_config[side]
        config.base_model_name_or_path = HUB_ID
        config.target_modules = sorted(config.target_modules)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, selected_adapters=list(SIDES), save_embedding_layers=False)
        for side in SIDES:
            source, folder = Path(temporary, side), out / side
            folder.mkdir(exist_ok=True)
            weights = load_file(source / "adapter_model.safetensors")
            save_file({k: v.half() for k, v in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
            (folder / "adapter_model.safetensors").chmod(0o644)
            shutil.copy(source / "adapter_config.json", folder)


def load_pair(base: Any, folder: Path) -> PeftModel:
    """The saved pair: what is measured is what was saved."""
    model = PeftModel.from_pretrained(base, folder / SIDES[0], adapter_name=SIDES[0])
    model.load_adapter(folder / SIDES[1], adapter_name=SIDES[1])
    return model.eval()


# ---- measuring -------------------------------------------------------------------------------------------------------


def member_logits(model: PeftModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The target's logits z and the pair's difference z⁺ − z⁻, both ``[B, T, V]``."""
    with torch.no_grad(), model.disable_adapter():
        target = model(input_ids=ids, use_cache=False).logits
    sides = []
    for side in SIDES:
        model.set_adapter(side)
        with torch.no_grad():
            sides.append(model(input_ids=ids, use_cache=False).logits)
    return target, sides[0].sub_(sides[1])


def log_odds(model: PeftModel, tokenizer: Any, lines: Sequence[Line], alphas: Sequence[float]) -> Tensor:
    """log p(stereotype) − log p(counter) of every line, in nats, as a tensor ``[alphas, lines]``."""
    columns = []
    for some in batches(lines, 8):
        ids, labels = encode(tokenizer, [line.stereotype for line in some] + [line.counter for line in some])
        target, difference = member_logits(model, ids)
        sums = torch.stack([token_losses(target + alpha * difference, labels).sum(1) for alpha in alphas])
        columns.append(sums[:, len(some) :] - sums[:, : len(some)])
    return torch.cat(columns, 1)


def perplexity(model: PeftModel, tokenizer: Any, text: str, alphas: Sequence[float], tokens: int) -> list[float]:
    """Perplexity of the first ``tokens`` tokens of ``text`` in windows of 512 without overlap, one for each α."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens])
    total, count = torch.zeros(len(alphas), dtype=torch.float64), 0
    for window in ids.split(512):
        if len(window) < 2:
            continue
        target, difference = member_logits(model, window[None])
        total += torch.stack([token_losses(target + a * difference, window[None]).double().sum() for a in alphas])
        count += len(window) - 1
    return (total / count).exp().tolist()


def next_words(model: PeftModel, tokenizer: Any, prompt: str, alphas: Sequence[float], top: int = 5) -> list[str]:
    """The likeliest next tokens with their probabilities, one line for each α."""
    target, difference = member_logits(model, encode(tokenizer, [prompt])[0])
    lines = []
    for alpha in alphas:
        p, ids = (target[0, -1] + alpha * difference[0, -1]).softmax(-1).topk(top)
        lines.append(
            ", ".join(f"{tokenizer.decode([i])!r} {q:.2f}" for q, i in zip(p.tolist(), ids.tolist(), strict=True))
        )
    return lines


def continuation(model: PeftModel, tokenizer: Any, prompt: str, alpha: float, seed: int, tokens: int = 20) -> str:
    """A sample with top-p 0.9, the plain way: every model again over the whole text at every step."""
    generator = torch.Generator().manual_seed(seed)
    ids = encode(tokenizer, [prompt])[0]
    for _ in range(tokens):
        target, difference = member_logits(model, ids)
        p, order = (target[0, -1] + alpha * difference[0, -1]).softmax(-1).sort(descending=True)
        p[p.cumsum(0) - p >= 0.9] = 0
        token = order[torch.multinomial(p, 1, generator=generator)]
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token[None]], 1)
    return tokenizer.decode(ids[0])


def interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, resampling lines."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (2000, len(values)), generator=generator)
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def evaluate(model: PeftModel, tokenizer: Any, args: argparse.Namespace, say: Callable) -> dict[str, Any]:
    """Held-out preference, perplexity and text at each α."""
    lines = read_lines(DATA / "heldout.txt")
    odds = log_odds(model, tokenizer, lines, ALPHAS).double()
    neutral = perplexity(model, tokenizer, (DATA / "neutral.txt").read_text(encoding="utf-8"), ALPHAS, 4096)
    wiki = perplexity(model, tokenizer, args.wikitext.read_text(), ALPHAS, 6144) if args.wikitext else None
    say(f"\nheld out: {len(lines)} pairs, none of whose topics is in train.txt (95 % bootstrap intervals)")
    say(
        f"{'α':>4}  {'stereotype preferred':>24}  {'log-odds, nats':>22}  {'neutral PPL':>11}"
        + ("  wikitext PPL" if wiki else "")
    )
    rows = []
    for i, alpha in enumerate(ALPHAS):
        prefers = (odds[i] > 0).double() * 100
        row = {
            "alpha": alpha,
            "stereotype_preferred_percent": prefers.mean().item(),
            "stereotype_preferred_ci95": interval(prefers),
            "log_odds": odds[i].mean().item(),
            "log_odds_ci95": interval(odds[i]),
            "neutral_perplexity": neutral[i],
        }
        if wiki:
            row["wikitext2_raw_perplexity"] = wiki[i]
        rows.append(row)
        (low, high), (low_odds, high_odds) = interval(prefers), interval(odds[i])
        say(
            f"{alpha:4.1f}  {prefers.mean():8.1f} % [{low:5.1f}, {high:5.1f}]  "
            f"{odds[i].mean():+6.2f} [{low_odds:+.2f}, {high_odds:+.2f}]  {neutral[i]:11.2f}"
            + (f"  {wiki[i]:12.2f}" if wiki else "")
        )
    for prompt in PROMPTS:
        say(f"\n{prompt} …")
        for alpha, words in zip(ALPHAS, next_words(model, tokenizer, prompt, ALPHAS), strict=True):
            say(f"  α {alpha:3.1f}  {words}")
        for alpha in ALPHAS:
            for seed in range(args.samples):
                say(f"  α {alpha:3.1f}  {continuation(model, tokenizer, prompt, alpha, seed)!r}")
    return {"pairs": len(lines), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for expert/, anti_expert/, log.txt, measured.json"
    )
    parser.add_argument(
        "--stage", choices=("train", "calibrate", "evaluate"), default="train", help="where to start (default train)"
    )
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="lines a step, for each of the two adapters")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--evaluate-every", type=int, default=15, help="steps between validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 (faster where the CPU multiplies it)")
    parser.add_argument("--samples", type=int, default=0, help="sampled continuations for each prompt and α")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--wikitext", type=Path, help="a raw WikiText-2 test file, for its perplexity (optional)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "log.txt").open("w" if args.stage == "train" else "a", encoding="utf-8") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        folder = smollm2_path()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        lines = read_lines(DATA / "train.txt")
        if args.stage == "train":
            model = new_pair(base, args.rank, args.seed)
            settings = {k: getattr(args, k) for k in ("rank", "steps", "batch", "lr", "seed", "bf16")}
            say(f"{HUB_ID}, {len(lines)} lines, {json.dumps(settings)}")
            train(model, tokenizer, lines, args, say)
            save_pair(model, args.out)
            base = model.unload()
        model = load_pair(base, args.out)
        if args.stage != "evaluate":
            calibrate(model, tokenizer, split_validation(lines)[1], say)
            save_pair(model, args.out)
            model = load_pair(model.unload(), args.out)
        measured = evaluate(model, tokenizer, args, say)
        (args.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
