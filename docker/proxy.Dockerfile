# The proxy: no torch, installs in seconds. Build from the repository's root:
#   docker build -f docker/proxy.Dockerfile -t tracegrad-proxy .
FROM python:3.11-slim-bookworm

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY adapters adapters
COPY trainer trainer
COPY tracestore tracestore
RUN pip install --no-cache-dir -c constraints.txt ".[postgres]"

RUN useradd --create-home --uid 10001 tracegrad
USER tracegrad
WORKDIR /home/tracegrad
EXPOSE 8080
STOPSIGNAL SIGTERM
# Any answer means that the proxy lives; whether engine and store do is `tracegrad status`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s CMD ["python", "-c", "import http.client; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/health'); c.getresponse()"]
CMD ["tracegrad", "proxy", "--config", "/etc/tracegrad/tracegrad.yaml"]
