# The trainer: torch, transformers, Ray. It computes on CPUs so far. Build from the repository's root:
#   docker build -f docker/trainer.Dockerfile -t tracegrad-trainer .
FROM python:3.11-slim-bookworm

# PyTorch's own index of CPU wheels: the default index has the CUDA builds, several gigabytes larger.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY adapters adapters
COPY trainer trainer
COPY tracestore tracestore
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" ".[train,postgres]"

# A named volume takes over the owner of the folder it is first mounted on.
RUN useradd --create-home --uid 10001 tracegrad && install -d -o tracegrad /var/lib/tracegrad
USER tracegrad
WORKDIR /home/tracegrad
STOPSIGNAL SIGTERM
# Nothing to ask over HTTP: it ends when it fails, and is started again; `tracegrad status` says what it last did.
HEALTHCHECK NONE
CMD ["tracegrad", "train", "--config", "/etc/tracegrad/tracegrad.yaml"]
