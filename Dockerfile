# A server on CPUs: docker build -t dance-jax . && docker run --rm dance-jax plan --hosts examples/hosts.txt
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ cmake ninja-build \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /
RUN pip install --no-cache-dir -c /constraints.txt /wheels/*.whl && rm -r /wheels /constraints.txt \
    && useradd --create-home dance
USER dance
WORKDIR /home/dance
COPY --chown=dance examples examples
ENTRYPOINT ["dance-jax"]
CMD ["--help"]
