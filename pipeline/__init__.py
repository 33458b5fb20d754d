"""Infrastructure of the recipe's steps: settings, exit codes, checkpoints, and code that steps share.

It may import `unfreeze`; `tasks` and `flows` import it. Only `pipeline.tracking` uses MLflow, which
the forkserver also imports in advance. No module of this package imports Prefect.
"""
