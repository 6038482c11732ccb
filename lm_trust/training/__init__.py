"""One Trainer for both worlds, and what surrounds it: configuration, checkpoints, evaluation, progress."""
