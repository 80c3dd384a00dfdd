"""Steer a language model while it decodes: softmax(z + Σ α(z⁺ − z⁻)), fast and inspectable."""

__version__ = "0.1.0"
