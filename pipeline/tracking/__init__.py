"""MLflow: the journal of records, its sender, the tracker of a step, the registry and the served model.

The only package that uses mlflow; the forkserver imports it in advance. It may import `unfreeze`, `pipeline.process`,
`pipeline.artifacts` and `pipeline.provenance`, not `pipeline.step`; `pipeline`, `tasks` and `flows` may import it.
"""
