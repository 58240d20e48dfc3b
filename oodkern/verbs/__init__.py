"""The verbs of the command line, one module each: what its help says, its arguments, and what it does.

`run(options, command)` prints, and returns the exit code; `command` is what was typed. What a verb needs is imported
when it runs, so that help is at hand at once.
"""

VERBS = (
    *("train", "evaluate", "score", "export", "compare", "extract", "select", "plan"),
    *("check-data", "calibrate", "select-outliers", "bench", "doctor"),
)
