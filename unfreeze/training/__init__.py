"""Training: the loop, the phases of the recipe, schedules, the learning-rate finder, checkpoints.

It may import `unfreeze.evaluation` and what is below it, not `unfreeze.reports`; the pipeline may import it.
"""
