"""Readers of published corpora, from a folder that the user names. Nothing is downloaded."""

from ensemble_decode.corpora.source import SentencePair, Source, find

__all__ = ["SentencePair", "Source", "find"]
