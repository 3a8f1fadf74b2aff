"""Training: the constrained trainer on TRL, and the data that makes alignment deeper. Needs `deepalign[train]`."""
