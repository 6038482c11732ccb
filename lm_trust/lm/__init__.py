"""The language world: a token-level MDP around a causal language model and its rewards."""
