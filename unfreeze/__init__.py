"""The machinery of the recipe: images, models, schedules, training, measuring, plotting.

Nothing here knows of Prefect, DVC or MLflow; it can be used, tested and timed without them.
"""
