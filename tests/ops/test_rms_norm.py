import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ensemble_decode.ops import library, reference_layers, rms_norm

from .cpu import DTYPES, ROUNDING, needs_library, on_one_and_two_threads, random, relative_error, variant

__all__ = ["variant"]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 20, 64, 65, 576])
def test_equals_the_reference(variant: str, dtype: torch.dtype, width: int) -> None:
    for rows in (1, 2, 7, 513):
        x, weight = random(rows, width, dtype=dtype, scale=3.0), random(width, dtype=dtype)
        for offset in (0.0, 1.0):
            expected = reference_layers.rms_norm(x.double(), weight.double(), 1e-5, offset)
            assert relative_error(rms_norm(x, weight, 1e-5, offset), expected) < ROUNDING[dtype]


@needs_library
@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_equals_transformers(kind: type, offset: float) -> None:
    norm = kind(96, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = random(5, 3, 96)
    torch.testing.assert_close(rms_norm(x, norm.weight.detach(), 1e-6, offset), norm(x).detach(), rtol=1e-6, atol=1e-6)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(variant: str, dtype: torch.dtype) -> None:
    x, weight = random(600, 100, dtype=dtype), random(100, dtype=dtype)
    batch = on_one_and_two_threads(lambda: rms_norm(x, weight, 1e-5))
    for row in (0, 1, 299, 300, 599):
        assert torch.equal(rms_norm(x[row], weight, 1e-5), batch[row])
    assert torch.equal(rms_norm(x[:, None].expand(-1, 2, -1), weight, 1e-5)[:, 1], batch)


@needs_library
def test_is_a_well_behaved_operator() -> None:
    torch.library.opcheck(torch.ops.ensemble_decode.rms_norm, (random(2, 3, 20), random(20), 1e-5, 1.0))
    with pytest.raises(RuntimeError, match=r"weight is \[19\], it must be \[20\]"):
        rms_norm(random(3, 20), random(19), 1e-5)


def test_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", False)
    x, weight = random(3, 17), random(17)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (17,), weight, 1e-5))
