# Image to train with, on GPUs or (--build-arg DEVICE=cpu) without:
#   docker build -t flm-megatron .
#   docker build -t flm-megatron:cpu --build-arg DEVICE=cpu .
# One of the two bases below is built, the other is not downloaded. Each comes with the newest megatron-core that its
# Python takes; the older series is chosen by
#   docker build -t flm-megatron:0.16 --build-arg ENGINE=0.16.1 .
#   docker build -t flm-megatron:cpu-0.16 --build-arg DEVICE=cpu --build-arg PYTHON=3.11 .
ARG DEVICE=cuda
# PyTorch 2.12.0a0, CUDA 13.2, NCCL 2.30, Python 3.12.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
ARG PYTHON=3.12

# NVIDIA's image has torch, Transformer Engine, Triton and NCCL with its network plugins, built for each other.
# hadolint ignore=DL3006 # its tag is in BASE
FROM ${BASE} AS cuda
WORKDIR /opt/flm-megatron
# The image without them would train, but slowly, so the build stops here. They are looked for and not imported:
# there is no GPU while an image is built. Apex, which the program can do without, is only spoken of.
RUN python -c "import sys; from importlib.metadata import version; from importlib.util import find_spec; \
    missing = [m for m in ('transformer_engine', 'triton') if not find_spec(m)]; \
    old = tuple(map(int, version('torch').split('.')[:2])) < (2, 9); \
    print('Apex is', 'there' if find_spec('apex') else 'not there: Transformer Engine and torch do its work'); \
    sys.exit(f'the base image lacks {missing}' if missing else 'torch of the base image is before 2.9' if old else 0)"
COPY LICENSE README.md pyproject.toml setup.py ./
COPY flm_megatron flm_megatron
# A release of megatron-core; none takes the newest of the supported ones.
ARG ENGINE=
# The wheel is built with a setuptools of its own; then the image's constraints (PIP_CONSTRAINT) keep its torch and what
# was built against it.
RUN PIP_CONSTRAINT='' pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheel . \
    && pip install --no-cache-dir /tmp/wheel/*.whl ${ENGINE:+"megatron-core==${ENGINE}"} && rm -r /tmp/wheel \
    && python -c "from flm_megatron.engine.version import require_engine; print('megatron-core', require_engine())"

FROM python:${PYTHON}-slim-bookworm AS cpu
WORKDIR /opt/flm-megatron
COPY constraints.txt ./
# From its own index torch comes without CUDA's libraries: its version, which ends in +cpu, ranks above PyPI's. What it
# needs comes from either.
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY LICENSE README.md pyproject.toml setup.py ./
COPY flm_megatron flm_megatron
RUN pip install --no-cache-dir --constraint constraints.txt . \
    && python -c "from flm_megatron.engine.version import require_engine; print('megatron-core', require_engine())"

# hadolint ignore=DL3006 # one of the two stages above, which are pinned
FROM ${DEVICE} AS final
# The number that manifests and volumes refer to; NVIDIA's image may have a user of that number already.
ARG USER_ID=1000
RUN getent passwd "${USER_ID}" || useradd --uid "${USER_ID}" --create-home trainer
# Run files lie here; data and runs are mounted beside them.
WORKDIR /workspace
COPY examples examples
RUN mkdir -p data runs && chown -R "${USER_ID}" /workspace
USER ${USER_ID}
# Threads of a process: the processes of a node share its cores.
ENV OMP_NUM_THREADS=1
CMD ["flm", "--help"]
