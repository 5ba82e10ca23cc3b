# `hf-unigd serve` in a container: for the CPU, or with `--build-arg TORCH=cu130` for CUDA.
FROM python:3.12-slim

# Which of PyTorch's builds to install, as its index names them: cpu, cu126, cu130, ...
ARG TORCH=cpu
# Of hf-unigd: the server with its page (app) or without (serve), and the index.
ARG EXTRAS=app,retrieval

# Threads that spin for each other would slow the preparation of the next batch.
ENV OMP_WAIT_POLICY=passive \
    MPLCONFIGDIR=/tmp/matplotlib \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app
COPY constraints.txt ./
# Before the package, so that a change of the code does not download torch again.
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --requirement torch.txt --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY hf_unigd hf_unigd
RUN pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && useradd --uid 1000 --create-home server

USER 1000
# Models of the Hub are kept here.
ENV HF_HOME=/home/server/cache
RUN mkdir /home/server/cache
VOLUME /home/server/cache
EXPOSE 8000

HEALTHCHECK --interval=10s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]

# SIGTERM ends it once what runs is finished.
STOPSIGNAL SIGTERM
ENTRYPOINT ["hf-unigd", "serve", "--host", "0.0.0.0", "--port", "8000"]
