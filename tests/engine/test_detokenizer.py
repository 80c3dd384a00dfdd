"""Text grows with the tokens, whole characters at a time, and ends at stop strings wherever tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ensemble_decode.engine.detokenizer import Detokenizer, decode_output, decoder

from .fake import PIECES, VOCAB, PieceTokenizer

TEXT = "the quick brown fox jumps over the lazy dog. Straße, naïve, 世界 and 😀👍🏽! def f(x):\n    return x + 1\n" * 4


class Wrapped:
    """A fast tokenizer as transformers wraps it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend_tokenizer = tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: pieces of UTF-8."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral, Gemma: "▁" for spaces, single bytes for what has no piece, the first space dropped."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz.",
        "▁th",
        "▁the",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary.setdefault("▁t", len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


FALLBACK = byte_fallback()
#: What is generated may be any bytes. Not so for byte fallback, which decodes a run of bytes as a whole: a wrong one at
#: the end makes those before it unreadable too, and nobody can know that while they are shown.
IDS = {
    "pieces": (decoder(PieceTokenizer(), True), st.lists(st.integers(0, VOCAB - 1), max_size=12)),
    "byte-level": (decoder(Wrapped(byte_level()), True), st.lists(st.integers(0, 319), max_size=12)),
    "byte-fallback": (
        decoder(Wrapped(FALLBACK), True),
        st.text(st.characters(codec="utf-8"), max_size=8).map(
            lambda text: FALLBACK.encode(text, add_special_tokens=False).ids
        ),
    ),
}


def encode(text: str) -> list[int]:
    return PieceTokenizer()(text).input_ids


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_text_comes_back_token_by_token(make, cut):
    tokenizer = make()
    text = "the quick fox 世界 naïve 😀👍🏽."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decode = decoder(Wrapped(tokenizer), True)
    reader, seen = Detokenizer(decode, ids[:cut]), []
    for token in ids[cut:]:
        reader.push([token])
        seen.append(reader.safe_text)
    reader.flush()
    assert decode(ids[:cut]).rstrip("�") + reader.text == text
    assert all(reader.text.startswith(part) and "�" not in part for part in seen)
    assert len(set(seen)) >= len(seen) // 2, "text comes as it grows"
    assert decode_output(decode, ids[:cut], ids[cut:]) == reader.text


@pytest.mark.parametrize("name", IDS)
@given(data=st.data())
@settings(deadline=None, database=None, max_examples=150)
def test_any_tokens_give_the_text_that_they_decode_to(name, data):
    decode, ids = IDS[name]
    prompt, output = data.draw(ids.filter(bool)), data.draw(ids)
    reader, before = Detokenizer(decode, prompt), ""
    for token in output:
        reader.push([token])
        assert reader.text.startswith(before)
        before = reader.text
    reader.flush()
    assert reader.text == decode_output(decode, prompt, output)


@given(
    output=st.lists(st.integers(1, VOCAB - 1), max_size=30),
    stops=st.lists(st.text("abcé ", min_size=1, max_size=3), min_size=1, max_size=3),
    include=st.booleans(),
)
@settings(deadline=None, database=None, max_examples=300)
def test_the_text_ends_at_the_first_stop_string(output, stops, include):
    decode = decoder(PieceTokenizer(), True)
    reader, shown = Detokenizer(decode, [1], tuple(stops), include), []
    for token in output:
        met = reader.push([token])
        shown.append(reader.safe_text)
        if met:
            break
    else:
        met = reader.flush()
    whole = decode(output)
    found = [(whole.find(stop), stop) for stop in stops if stop in whole]
    assert (met is not None) == bool(found)
    if met is None:
        assert reader.text == whole
    else:
        at = whole.find(met)
        assert reader.text == whole[: at + len(met) if include else at]
        before = decode(output[: len(shown) - 1])  # of several that one token completes, the first and longest is met
        assert not any(stop in before for stop in stops), "an earlier one was passed over"
    assert all(reader.text.startswith(part) for part in shown), "what was shown was taken back"


def test_a_stop_string_across_tokens_is_never_shown_in_part():
    reader = Detokenizer(decoder(PieceTokenizer(), True), [1], ("the end",))
    shown = []
    for token in encode("a the dog. the end"):
        reader.push([token])
        shown.append(reader.safe_text)
    assert reader.stop == "the end"
    assert reader.text == "a the dog. "
    assert shown[-3:] == ["a the dog. "] * 3


def test_half_a_character_is_held_back():
    reader = Detokenizer(decoder(PieceTokenizer(), True), [1])
    states = []
    for byte in "a😀".encode():
        reader.push([PIECES.index(bytes([byte]))])
        states.append(reader.safe_text)
    assert states == ["a", "a", "a", "a", "a😀"]


@pytest.mark.parametrize("byte", ["é".encode()[1:], "é".encode()[:1], "😀".encode()[:1]], ids=["last", "first", "of-4"])
def test_bytes_that_are_no_text_are_not_held_back_for_ever(byte):
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return PieceTokenizer().decode(ids)

    reader, output = Detokenizer(decode, [1]), [PIECES.index(byte)] * 200
    reader.push(output)
    assert len(reader.text) > 190
    assert max(decoded) < 30, "all of it is decoded again and again"
    for end in "😀".encode(), b"a":
        for piece in end:
            output.append(PIECES.index(bytes([piece])))
            reader.push(output[-1:])
    assert reader.text == PieceTokenizer().decode(output)


def test_an_end_in_half_a_character_shows_that_something_is_missing():
    reader = Detokenizer(decoder(PieceTokenizer(), True), [1])
    reader.push([encode("a")[0], encode("😀")[0]])
    assert reader.text == "a"
    reader.flush()
    assert reader.text == "a�"


def test_stop_strings_before_min_tokens_do_not_count():
    reader = Detokenizer(decoder(PieceTokenizer(), True), [1], ("b",))
    assert reader.push(encode("a"), may_stop=False) is None
    assert reader.push(encode("b"), may_stop=False) is None
    assert reader.push(encode("c"), may_stop=True) is None
    assert reader.push(encode("b"), may_stop=True) == "b"
    assert reader.text == "abc"


def test_special_tokens_have_no_text_unless_asked_for():
    ids = [*encode("a"), 0, *encode("b")]
    for skip, text in ((True, "ab"), (False, "a<end>b")):
        reader = Detokenizer(decoder(PieceTokenizer(), skip), [1])
        reader.push(ids)
        assert reader.text == text
