"""Where the rows of tasks come from: as published, made from a seed, or the user's copy; and their tfds builders.

Nothing here knows a task: `sva.tasks` asks, grades and splits what these modules give.
"""
