"""The library behind the recipe: images, models, schedules, training, evaluation, plots.

It does not import Prefect, DVC or MLflow, and can be used, tested and timed without them.
"""
