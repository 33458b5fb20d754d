"""Prefect's flow, tasks and deployment, and the command line.

The only place that imports Prefect. It may import `pipeline` and `unfreeze`, not `tasks`: DVC starts the steps.
"""

from pipeline.process.environment import set_environment, set_prefect_home

# A worker imports this package first, before the flow can use any of it.
set_environment()
set_prefect_home()
