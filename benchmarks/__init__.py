"""Speed and memory, ours against theirs, side by side in one process. Never part of the tests."""
