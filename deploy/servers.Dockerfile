# Prefect's and MLflow's servers, at the versions that constraints.txt pins.
FROM python:3.12-slim
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt asyncpg boto3 "mlflow[auth]" prefect "psycopg[binary]" \
    && useradd --create-home unfreeze
USER unfreeze
WORKDIR /home/unfreeze
ENV DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false MLFLOW_DISABLE_TELEMETRY=true
