"""What a model is still good for: tasks of lm-evaluation-harness on one loaded model, scored with intervals.

`catalogue` names tasks, `harness` finds and runs them, `language_model` is the model as the harness sees it, `rows`
reads local data, `scores` makes rates of answers, and `tasks/` holds the built-in ones. Knows nothing of attacks or
judges.
"""
