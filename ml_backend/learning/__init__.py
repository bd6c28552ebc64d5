"""The loop: what to learn from, when to train, what to promote, what to answer."""
