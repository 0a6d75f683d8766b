# `sva serve` for CPUs: docker build -t sva . && docker run -p 127.0.0.1:8000:8000 -v sva-cache:/cache sva
FROM python:3.12-slim

WORKDIR /opt/sva
COPY requirements-serve.lock ./
RUN pip install --no-cache-dir --require-hashes -r requirements-serve.lock
COPY pyproject.toml README.md LICENSE ./
COPY sva sva
RUN pip install --no-cache-dir --no-deps . \
    && useradd --uid 1000 --create-home sva \
    && mkdir /cache && chown sva /cache

USER sva
ENV SVA_CACHE=/cache HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://localhost:8000/readyz')"]
# The container's own network is as far as it listens; publish the port to 127.0.0.1, or give --token-file.
ENTRYPOINT ["sva", "serve", "--host", "0.0.0.0"]
