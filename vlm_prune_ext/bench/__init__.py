"""How fast pruning is: prefill, decoding and whole answers, side by side and against the floor."""
