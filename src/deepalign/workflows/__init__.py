"""The verbs, read top to bottom: each strings the rooms together and leaves a run folder."""
