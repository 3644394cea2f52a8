# docker build -t llm-pager . && docker run -p 8080:8080 -v llm-pager:/data llm-pager

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proxy ./proxy
RUN python -m venv /opt/llm-pager \
    && /opt/llm-pager/bin/pip install --no-cache-dir '.[encryption,objects,postgres,telemetry]'

FROM python:3.11-slim
RUN groupadd --gid 10001 pager \
    && useradd --uid 10001 --gid pager --no-create-home --shell /usr/sbin/nologin pager \
    && install --directory --owner=pager --group=pager --mode=0700 /data
COPY --from=build /opt/llm-pager /opt/llm-pager

# Settings are variables, so that arguments given to `docker run` add to them.
# The working directory holds no config.yaml: mount one at /etc/llm-pager/config.yaml to use it.
# The variables below beat a mounted config.yaml: server.host, server.port and tiers.l2.path have no
# effect in it. Change the port with -e LLM_PAGER_SERVER__PORT=9000 (and -p 9000:9000), not with
# --port: the health check reads the variable.
ENV PATH=/opt/llm-pager/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LLM_PAGER_SERVER__HOST=0.0.0.0 \
    LLM_PAGER_SERVER__PORT=8080 \
    LLM_PAGER_TIERS__L2__PATH=/data

WORKDIR /etc/llm-pager
USER 10001:10001
# A named volume takes over the owner of /data; a bind mount on it must be writable by uid 10001.
VOLUME ["/data"]
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['LLM_PAGER_SERVER__PORT'] + '/health', timeout=3)"]
ENTRYPOINT ["llm-pager"]
CMD ["serve"]
