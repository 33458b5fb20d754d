"""What Prefect runs, and the command line in front of it.

The only place that imports Prefect. It may import `pipeline` and `unfreeze`, not `tasks`: DVC starts the steps.
"""

from pipeline.process.environment import set_environment, set_prefect_home

# A worker imports this package first of all, before Prefect's flow can ask for any of it.
set_environment()
set_prefect_home()
