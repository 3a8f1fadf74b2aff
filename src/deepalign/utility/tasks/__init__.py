"""The built-in tasks as lm-evaluation-harness reads them: one YAML file each, and the functions that they name.

`lm-eval run --include_path` takes this folder too.
"""
