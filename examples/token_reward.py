"""Rewards that score the parts of a completion themselves: each of its tokens, or each of its steps.

    rewards:
      - {name: examples.token_reward:new_words, level: token, weight: 0.05}
      - {name: examples.token_reward:short_sentences, level: step, step_delimiter: "."}

A token is paid its own number at once; a step's number is paid at the token that completes the step. What a completion
earns is the sum.

    lm-trust train configs/lm/token_and_step.yaml
"""


def new_words(completion_tokens: list[list[str]]) -> list[list[float]]:
    """1 for a token whose text is not yet in the completion, -1 for one that repeats."""
    return [
        [-1.0 if token in tokens[:position] else 1.0 for position, token in enumerate(tokens)]
        for tokens in completion_tokens
    ]


def short_sentences(steps: list[list[str]]) -> list[list[float]]:
    """1 for a sentence of one to eight words, 0 for any other."""
    return [[float(1 <= len(step.split()) <= 8) for step in sentences] for sentences in steps]
