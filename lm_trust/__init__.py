"""lm_trust: trust-region policy optimisation for language models and control tasks, on the same core."""

__version__ = "0.1.0"
