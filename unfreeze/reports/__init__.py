"""Reports for people: HTML pages and plots of the exploration and of the evaluation.

It may import `unfreeze.evaluation` and what is below it, not `unfreeze.training`; the pipeline may import it.
"""
