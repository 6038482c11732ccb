"""A reward of one's own: short completions score more.

Name it in a configuration by its dotted path, alone or beside others, and start the run in the folder above
this one:

    rewards:
      - {name: examples.custom_reward:brevity, weight: 1.0}

Every column of the prompts arrives as a list under its own name: a reward that compares with the column
`answer` is written `def exact(prompts, completions, answer, **fields)`.
"""


def brevity(prompts: list[str], completions: list[str], **fields: list) -> list[float]:
    """One finite number for each completion, in order: 1 for no words, 1/2 for one, towards 0 for many."""
    return [1.0 / (1.0 + len(completion.split())) for completion in completions]
