# The SGLang Model Gateway, which spreads requests over replicas of the server:
#   docker build -f deploy/router.Dockerfile -t idlm-router .
FROM python:3.11-slim
RUN pip install --no-cache-dir --disable-pip-version-check smg==1.13.0 \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin router
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["smg", "launch", "--host", "0.0.0.0", "--port", "8000"]
