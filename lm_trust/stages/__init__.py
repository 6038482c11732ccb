"""The stages before reinforcement learning: supervised fine-tuning, and a reward model from preferences."""
