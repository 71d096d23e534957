# Image to train with, on GPUs or (--build-arg DEVICE=cpu) without:
#   docker build -t flm-megatron .
#   docker build -t flm-megatron:cpu --build-arg DEVICE=cpu .
# One of the two bases below is built, the other is not downloaded.
ARG DEVICE=cuda

# NVIDIA's image has torch, Transformer Engine, Apex, Triton and NCCL with its network plugins, built for each other.
FROM nvcr.io/nvidia/pytorch:25.04-py3 AS cuda
WORKDIR /opt/flm-megatron
# The image without them would train, but slowly, so the build stops here. They are looked for and not imported:
# there is no GPU while an image is built.
RUN python -c "import sys; from importlib.util import find_spec; \
    missing = [m for m in ('transformer_engine', 'apex', 'amp_C', 'fused_layer_norm_cuda', 'triton') if not find_spec(m)]; \
    sys.exit(f'the base image lacks {missing}' if missing else 0)"
COPY LICENSE README.md pyproject.toml setup.py ./
COPY flm_megatron flm_megatron
# The wheel is built with a setuptools of its own; then the image's constraints (PIP_CONSTRAINT) keep its torch and what
# was built against it.
RUN PIP_CONSTRAINT= pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheel . \
    && pip install --no-cache-dir /tmp/wheel/*.whl && rm -r /tmp/wheel

FROM python:3.11.13-slim-bookworm AS cpu
WORKDIR /opt/flm-megatron
COPY constraints.txt ./
# From its own index torch comes without CUDA's libraries: its version, which ends in +cpu, ranks above PyPI's. What it
# needs comes from either.
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY LICENSE README.md pyproject.toml setup.py ./
COPY flm_megatron flm_megatron
RUN pip install --no-cache-dir --constraint constraints.txt .

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
