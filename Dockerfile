# One image for each tested set of versions; docs/container.md says how to build, run and move it.
#   docker build --tag mlip:cpu .
#   docker build --build-arg SET=gpu --build-arg PYTHON=3.12 --tag mlip:gpu .
ARG PYTHON=3.11
# or an image of your own registry with "python" of that version, its venv module and Python.h
ARG BASE=python:${PYTHON}-slim-bookworm

# Everything but the project, so that a change of code leaves these gigabytes as they are. What the
# index is and how to enter it is told in this stage alone and stays out of the image's history.
FROM ${BASE} AS packages
ARG SET=cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
WORKDIR /source
COPY constraints constraints
COPY setup.py pyproject.toml ./
RUN set -e; \
    found=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
    case "$SET $found" in \
      "cpu 3.11") extras=deepspeed,dali,onnx ;; \
      "gpu 3.12") extras=gpu,onnx ;; \
      *) echo "SET=$SET with Python $found: cpu needs PYTHON=3.11, gpu PYTHON=3.12" >&2; exit 1 ;; \
    esac; \
    mkdir mlip kernels dataloading; touch README.md; \
    python -m venv /opt/venv; \
    /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check \
      -c "constraints/$SET.txt" ".[$extras]"; \
    /opt/venv/bin/pip uninstall --yes mlip-medical

FROM packages AS project
WORKDIR /project-source
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps \
      --prefix /project . \
    && PYTHONPATH=$(echo /project/lib/python3*/site-packages) /opt/venv/bin/pip check

FROM ${BASE}
# Triton (at a kernel's first call), torch.compile and DeepSpeed's offload compile when they run.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/venv /opt/venv
COPY --from=project /project /opt/venv
WORKDIR /mlip
COPY train.py LICENSE ./
COPY configs configs
ARG SET=cpu
ARG COMMIT
ARG UID=1000
# Where to mount, also below a root that is read-only. Behind the arguments: buildah 1.28 takes ENV,
# LABEL and USER from its cache whatever they are told, and would keep the commit of another build.
RUN mkdir runs /data
# Any user id may run it: without a line in /etc/passwd there is no name and no home, so that
# caches of kernels and loops find their place by these.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=mlip \
    PYTHONUNBUFFERED=1 \
    MLIP_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="mlip-medical (${SET})" \
      org.opencontainers.image.description="Medical language-image pre-training; not a medical device" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
USER ${UID}
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "mlip.first_process"]
CMD ["mlip", "--help"]
