"""placeholder dispatch until the C++ operator is in"""
from typing import NamedTuple
from torch import Tensor
from . import reference
class EnsembleSample(NamedTuple):
    token: Tensor
    logprob: Tensor
    target_logprob: Tensor
def ensemble_sample(*a, **k):
    return EnsembleSample(*reference.ensemble_sample(*a, **k))
combine = reference.combine
