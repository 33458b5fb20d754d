"""Infrastructure of the recipe's steps: settings, exit codes, checkpoints, and code that steps share.

It may import `unfreeze`; `tasks` and `flows` import it. MLflow is imported in `pipeline.tracking` alone, Prefect nowhere.
"""
