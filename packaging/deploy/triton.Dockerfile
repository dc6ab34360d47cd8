# SPDX-License-Identifier: Apache-2.0
# Triton Inference Server for CPUs with the drex backend. Built from the root of the checkout:
#
#   docker build -f packaging/deploy/triton.Dockerfile -t drex-triton .
#
# Nothing is fetched but packages: Debian's, crates, and two Python packages that carry llama.cpp's source and the server.

# A Rust toolchain on Debian 12, and what the server runs on.
ARG BUILDER=rust:1.95-bookworm
ARG BASE=debian:bookworm-slim
# The stage, or an image, whose /opt/drex is the backend.
ARG BACKEND=build

FROM ${BUILDER} AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake g++ ninja-build python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# For every x86-64 processor with AVX2, and not only for the one that builds.
ENV DREX_CACHE=/cache DREX_CMAKE_ARGS=-DGGML_NATIVE=OFF
RUN cargo xtask triton --install /opt/drex

FROM ${BACKEND} AS backend

FROM ${BASE} AS server
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-pip && rm -rf /var/lib/apt/lists/*
RUN echo 'nvidia-pytriton==0.7.0 --hash=sha256:21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df' > /server.txt \
    && python3 -m pip install --no-cache-dir --no-deps --require-hashes --target /opt/server -r /server.txt \
    && chmod +x /opt/server/pytriton/tritonserver/bin/tritonserver \
    && rm -r /opt/server/pytriton/tritonserver/backends /opt/server/pytriton/tritonserver/python_backend_stubs

FROM ${BASE} AS triton
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libstdc++6 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home drex
COPY --from=server /opt/server /opt/server
COPY --from=backend /opt/drex/backends /opt/drex/backends
USER 10001
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --start-period=60s CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8000 && printf 'GET /v2/health/ready HTTP/1.0\\r\\n\\r\\n' >&3 && grep -q '^HTTP/1.[01] 200' <&3"]
# SIGTERM ends it when the requests that run are answered, and after the exit timeout at the latest.
ENTRYPOINT ["/opt/server/pytriton/tritonserver/bin/tritonserver", "--backend-directory=/opt/drex/backends"]
CMD ["--model-repository=/models", "--exit-timeout-secs=60"]
