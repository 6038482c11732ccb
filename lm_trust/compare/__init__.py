"""Update rules side by side: runs that differ in nothing else, matched by the KL that they realised."""
