"""How biased and how good a system is: one metric, one file."""

from ensemble_decode.evaluation.metric import Figure, Metric, Record, System

__all__ = ["Figure", "Metric", "Record", "System"]
