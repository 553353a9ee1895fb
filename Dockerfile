# The images of Tercet, one target each: embedding, rerank, search, tools. docs/compose.md says how to build and run them.
#
#   docker build --target search -t tercet-search:0.1.0 .
#   docker build --target embedding --build-arg VARIANT=gpu -t tercet-embedding:0.1.0-gpu .

# Pin it by digest where builds have to be repeatable to the byte: --build-arg BASE=python:3.11-slim-bookworm@sha256:…
ARG BASE=python:3.11-slim-bookworm
# cpu or gpu: which torch the images with models get.
ARG VARIANT=cpu
# What the labels say; VERSION is the package's.
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown

FROM ${BASE} AS base
SHELL ["/bin/sh", "-eu", "-c"]
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# The tools of the build, which stay out of the images.
FROM base AS builder
WORKDIR /from
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /builder && /builder/bin/python -m pip install -c constraints.txt setuptools

# What each layer installs, as files that stay the same while other parts of pyproject.toml change: layers of packages are
# then not made, pushed and pulled anew with every release.
FROM base AS requirements
COPY deploy/images/requirements.py pyproject.toml /from/
RUN python3 /from/requirements.py /from/pyproject.toml /requirements

FROM builder AS code
COPY pyproject.toml README.md LICENSE ./
COPY training training/
COPY services services/
COPY tercet tercet/
RUN /builder/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheel . \
 && /builder/bin/python -m pip install --no-cache-dir --no-deps --target /code /wheel/*.whl \
 && mkdir -p /code/tercet/models

# Everything that runs: a user without a name to log in with, two places to write to, and Python packages in /opt/tercet.
FROM base AS runtime
RUN groupadd --gid 10001 tercet \
 && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /var/lib/tercet --shell /usr/sbin/nologin tercet \
 && install -d -o 10001 -g 10001 -m 0750 /var/lib/tercet /var/cache/tercet \
 && python3 -m venv --without-pip /opt/tercet
# XDG_CACHE_HOME: converted models and measurements. HF_HOME: models of the hub, for those who name one.
ENV PATH=/opt/tercet/bin:$PATH \
    PYTHONPATH=/opt/tercet/code \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache \
    HF_HOME=/var/cache/tercet/huggingface
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=builder,source=/builder,target=/builder \
    --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    /builder/bin/python -m pip --python /opt/tercet/bin/python install --only-binary :all: -c /constraints.txt -r /requirements/service.txt
VOLUME ["/var/lib/tercet", "/var/cache/tercet"]
WORKDIR /var/lib/tercet

# Linux's default wheel of torch brings CUDA's libraries (gigabytes); the CPU variant
# takes the wheel without them.
FROM runtime AS torch
ARG VARIANT
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=builder,source=/builder,target=/builder \
    --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    case "$VARIANT" in \
        cpu) /builder/bin/python -m pip --python /opt/tercet/bin/python install --only-binary :all: -c /constraints.txt \
                --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r /requirements/torch.txt ;; \
        gpu) ;; \
        *) echo "VARIANT is cpu or gpu, and not $VARIANT" >&2; exit 1 ;; \
    esac \
 && /builder/bin/python -m pip --python /opt/tercet/bin/python install --only-binary :all: -c /constraints.txt -r /requirements/torch.txt

# The default embedding model is one of these packages, so a start needs no network.
FROM torch AS models
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=builder,source=/builder,target=/builder \
    --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    /builder/bin/python -m pip --python /opt/tercet/bin/python install --only-binary :all: -c /constraints.txt -r /requirements/models.txt

FROM models AS embedding
COPY --from=code /code/tercet-*.dist-info/METADATA /opt/tercet/code/tercet.dist-info/
COPY --from=code /code/services/__init__.py /opt/tercet/code/services/
COPY --from=code /code/services/common /opt/tercet/code/services/common/
COPY --from=code /code/services/embedding /opt/tercet/code/services/embedding/
ENV EMBEDDING_LISTEN_HOST=0.0.0.0 \
    EMBEDDING_PORT_FILE=/tmp/tercet.port
EXPOSE 8001
USER 10001:10001
ENTRYPOINT ["python", "-m", "services.embedding"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-m", "services.common.health_check", "/tmp/tercet.port"]
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.title="tercet-embedding" \
      org.opencontainers.image.description="Tercet's embedding service: texts into vectors, with all-MiniLM-L6-v2 inside" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"

# tercet/models holds the project's own cross-encoder.
FROM models AS rerank
COPY --from=code /code/tercet/models /opt/tercet/code/tercet/models/
COPY --from=code /code/tercet-*.dist-info/METADATA /opt/tercet/code/tercet.dist-info/
COPY --from=code /code/services/__init__.py /opt/tercet/code/services/
COPY --from=code /code/services/common /opt/tercet/code/services/common/
COPY --from=code /code/services/rerank /opt/tercet/code/services/rerank/
ENV RERANK_LISTEN_HOST=0.0.0.0 \
    RERANK_PORT_FILE=/tmp/tercet.port
EXPOSE 8002
USER 10001:10001
ENTRYPOINT ["python", "-m", "services.rerank"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-m", "services.common.health_check", "/tmp/tercet.port"]
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.title="tercet-rerank" \
      org.opencontainers.image.description="Tercet's rerank service: scores of query-document pairs, with its models inside" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"

# Every command of `tercet`, those that open models and ledgers included: jobs, migrations, backups.
FROM models AS tools
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=builder,source=/builder,target=/builder \
    --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    /builder/bin/python -m pip --python /opt/tercet/bin/python install --only-binary :all: -c /constraints.txt -r /requirements/tools.txt
RUN --mount=type=bind,from=builder,source=/builder,target=/builder \
    --mount=type=bind,from=code,source=/wheel,target=/wheel \
    /builder/bin/python -m pip --python /opt/tercet/bin/python install --no-cache-dir --no-deps /wheel/*.whl
USER 10001:10001
ENTRYPOINT ["tercet"]
CMD ["--help"]
HEALTHCHECK NONE
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.title="tercet-tools" \
      org.opencontainers.image.description="Tercet's command line, with all that its commands need" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"

# Last, and so what `docker build` makes when it is told no target: a search service, a router, or a node (`--role shard`).
FROM runtime AS search
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=builder,source=/builder,target=/builder \
    --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    /builder/bin/python -m pip --python /opt/tercet/bin/python install --only-binary :all: -c /constraints.txt -r /requirements/search.txt
COPY --from=code /code/tercet-*.dist-info/METADATA /opt/tercet/code/tercet.dist-info/
COPY --from=code /code/services/__init__.py /opt/tercet/code/services/
COPY --from=code /code/services/common /opt/tercet/code/services/common/
COPY --from=code /code/services/search /opt/tercet/code/services/search/
ENV SEARCH_LISTEN_HOST=0.0.0.0 \
    SEARCH_DATA_DIR=/var/lib/tercet \
    SEARCH_PORT_FILE=/tmp/tercet.port
EXPOSE 8000 8010
USER 10001:10001
ENTRYPOINT ["python", "-m", "services.search"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-m", "services.common.health_check", "/tmp/tercet.port"]
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.title="tercet-search" \
      org.opencontainers.image.description="Tercet's search service: ledger, shards and the search pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
