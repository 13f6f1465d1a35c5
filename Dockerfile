# The server (docs/serving.md). For a CPU:
#   docker build -t llamagen .
#   docker run --rm -p 8000:8000 -v llamagen-cache:/cache --stop-timeout 330 llamagen c2i_B_256
# For NVIDIA GPUs, with PyPI's build of PyTorch, which brings CUDA (some gigabytes):
#   docker build -t llamagen-gpu --build-arg PIP_ARGS= .
#   docker run --rm --gpus all -p 8000:8000 -v llamagen-cache:/cache --stop-timeout 330 llamagen-gpu c2i_B_256
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# The compiler builds the sampling engine for the processor, or the GPU, at the first start; see docs/sampling.md.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# Dependencies first: they are installed again only when these files change. The project itself is empty in this layer.
ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
COPY pyproject.toml constraints.txt README.md LICENSE main.py ./
# hadolint ignore=SC2086
RUN pip install --no-cache-dir --constraint constraints.txt ${PIP_ARGS} ".[serve]"

COPY llamagen llamagen
COPY serving serving

# Downloads of models, and compiled code, outlive the container if /cache is a volume.
ENV PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    XDG_CACHE_HOME=/cache
RUN useradd --uid 1000 --create-home llamagen && mkdir /cache && chown llamagen /cache
USER 1000
VOLUME /cache
EXPOSE 8000

# /health answers from the start; a load balancer asks /ready, which is 503 while the model is being loaded.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "serving.server", "--host", "0.0.0.0", "--port", "8000"]
CMD ["c2i_B_256"]
