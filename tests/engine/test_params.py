"""Every parameter's allowed values, and the one line that answers what is not allowed."""

from __future__ import annotations

import math
import re

import pytest

from ensemble_decode.engine.params import SamplingParams, sample_seed

from .fake import LAYOUT, PLAIN, VOCAB

ALLOWED = {
    "alpha": [None, 0, -1.5, 2, {}, {"gender": 1.0}],
    "temperature": [0, 0.0, 1, 2.5],
    "top_p": [1, 1.0, 0.1, 1e-6],
    "top_k": [-1, 0, 1, 10**12],
    "min_p": [0, 0.5],
    "nucleus": ["combined", "target"],
    "max_tokens": [1, 10**6],
    "min_tokens": [0, 16],
    "n": [1, 1024],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "stop": [None, "a", ["a", "b"], ("a",), []],
    "stop_token_ids": [None, [], [1, 2], (3,)],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True, False],
    "skip_special_tokens": [True, False],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "repetition_penalty": [1, 0.5, 2.0],
    "presence_penalty": [-2, 0.0, 2],
    "frequency_penalty": [-2.0, 0, 2],
    "logit_bias": [None, {}, {3: 1.5, 4: -100}],
}
NOT_NUMBERS = ["1", True, [1], math.nan, math.inf, -math.inf, 10**400, 1e300]
NOT_INTEGERS = ["1", 1.0, True, [1], math.nan]
REFUSED = {
    "alpha": [*NOT_NUMBERS, {"gender": "1"}, {"gender": math.nan}, {"gender": None}, {3: 1.0}],
    "temperature": [*NOT_NUMBERS, None, -0.1, 1e-50, 1e-7],
    "top_p": [*NOT_NUMBERS, None, 0, -0.1, 1.1, 1e-50],
    "top_k": [*NOT_INTEGERS, None, -2],
    "min_p": [*NOT_NUMBERS, None, -0.1, 1.0, 0.99999999],
    "nucleus": ["both", None, 1, ["combined"]],
    "max_tokens": [*NOT_INTEGERS, None, 0, -1],
    "min_tokens": [*NOT_INTEGERS, None, -1, 17],
    "n": [*NOT_INTEGERS, None, 0, 1025],
    "seed": [*NOT_INTEGERS, 2**64, -(2**63) - 1],
    "stop": ["", [""], [1], 1, 0, False, {"a": 1}],
    "stop_token_ids": [3, 0, "3", ["3"], [True], [-1], [1.0]],
    "ignore_eos": [1, 0, None, "yes"],
    "include_stop_str_in_output": [1, None],
    "skip_special_tokens": [1, None],
    "logprobs": [*NOT_INTEGERS, -1, 1001],
    "prompt_logprobs": [*NOT_INTEGERS, -1, 1001],
    "repetition_penalty": [*NOT_NUMBERS, None, 0, -1],
    "presence_penalty": [*NOT_NUMBERS, None, 2.1, -2.1],
    "frequency_penalty": [*NOT_NUMBERS, None, 2.1, -2.1],
    "logit_bias": [[1], 3, {"3": 1.0}, {3: "1"}, {3: math.nan}, {-1: 1.0}, {True: 1.0}, {3: 1e300}],
}


def test_every_parameter_is_in_both_tables():
    fields = set(SamplingParams.__dataclass_fields__) - {"stops"}
    assert fields == set(ALLOWED) == set(REFUSED)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ALLOWED.items() for value in values])
def test_allowed(name, value):
    SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in REFUSED.items() for v in values],
    ids=lambda v: re.sub("0{20,}", "0…0", str(v)),
)
def test_refused_in_one_line_that_names_it(name, value):
    with pytest.raises(ValueError, match="allowed") as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(name)


def test_an_unknown_pair_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'age'.*known are 'gender', 'tone', 'guide'"):
        SamplingParams(alpha={"age": 1.0}).check(LAYOUT)
    with pytest.raises(ValueError, match=r"'age'.*known are none"):
        SamplingParams(alpha={"age": 1.0}).check(PLAIN)


@pytest.mark.parametrize(
    "params", [SamplingParams(logit_bias={VOCAB: 1.0}), SamplingParams(stop_token_ids=[VOCAB])], ids=str
)
def test_a_token_beyond_the_vocabulary_is_refused(params):
    with pytest.raises(ValueError, match=f"token {VOCAB}, allowed is 0 … {VOCAB - 1}"):
        params.check(LAYOUT)


@pytest.mark.parametrize(
    ("alpha", "found"),
    [
        (None, {0: 1.0}),
        (0, {}),
        (2, {0: 2.0, 1: 2.0, 2: 2.0}),
        ({}, {}),
        ({"tone": -1}, {1: -1.0}),
        ({"tone": 0, "guide": 3}, {2: 3.0}),
    ],
    ids=str,
)
def test_alphas_of_the_pairs(alpha, found):
    assert SamplingParams(alpha=alpha).alphas(LAYOUT) == found


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
def test_sample_seeds_are_signed_and_follow_the_contract(seed):
    for index in (0, 1, 2, 1023):
        found = sample_seed(seed, index)
        assert -(2**63) <= found < 2**63
        assert (found - seed - index * 0x9E3779B97F4A7C15) % 2**64 == 0
