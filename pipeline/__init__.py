"""Infrastructure of the recipe's steps: settings, exit codes, checkpoints, and code that steps share.

It may import `unfreeze`; `tasks` and `flows` import it. Only `pipeline.tracking` imports MLflow, none imports Prefect.
"""
