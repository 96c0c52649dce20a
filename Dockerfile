# Quire as a container: `docker build --target cpu -t quire:cpu .` or `--target cuda -t quire:cuda .`
# (`podman build` and `buildah bud` need `--format docker`, or they drop the HEALTHCHECK). How to run: deploy/README.md.
#
# Both targets start from plain Python. The CUDA wheels of torch bring the CUDA libraries they were built for, so an
# nvidia/cuda base would only add a second, different copy of them; the host's driver comes in at run time through the
# NVIDIA container toolkit.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS base
# g++ stays in the final image: Triton, and the CPU kernels, compile for the machine at hand at first use.
# tini is process 1: it reaps orphans of a dead engine process, and lets SIGTERM end a server that is still importing
# (the kernel ignores signals without a handler for process 1).
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ tini \
 && rm -rf /var/lib/apt/lists/*


FROM base AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .


# The dependencies go in from pyproject.toml alone, torch first, so that a change of the sources rebuilds none of them.
FROM base AS environment
WORKDIR /src
RUN python -m venv --without-pip /opt/quire
COPY pyproject.toml .
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt


FROM environment AS environment-cuda
ARG TORCH_VERSION=2.13.0
# Empty: the default index, whose Linux wheels are the CUDA ones; they bring the Triton that fits.
ARG TORCH_INDEX=
RUN pip --python /opt/quire/bin/python install --no-cache-dir \
    ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch==${TORCH_VERSION}"
RUN pip --python /opt/quire/bin/python install --no-cache-dir --requirement requirements.txt
COPY --from=wheel /wheel /wheel
RUN pip --python /opt/quire/bin/python install --no-cache-dir --no-deps /wheel/*.whl


FROM environment AS environment-cpu
ARG TORCH_VERSION=2.13.0
# The CPU wheels: some 200 MB instead of several GB. Empty: the default index (where only a mirror of it is at hand).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/quire/bin/python install --no-cache-dir \
    ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch==${TORCH_VERSION}"
RUN pip --python /opt/quire/bin/python install --no-cache-dir --requirement requirements.txt
COPY --from=wheel /wheel /wheel
RUN pip --python /opt/quire/bin/python install --no-cache-dir --no-deps /wheel/*.whl


FROM base AS runtime
LABEL org.opencontainers.image.title="Quire" \
      org.opencontainers.image.description="LLM inference server with a prunable paged KV cache" \
      org.opencontainers.image.licenses="Apache-2.0"
# A fixed uid, so that files on volumes keep their owner from one image to the next.
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin quire \
 && install --directory --owner=quire --group=quire /var/cache/quire
COPY deploy/healthcheck.py /usr/local/lib/quire/healthcheck.py
# What is worth keeping between containers lies in one place: checkpoints from the hub and compiled kernels.
ENV PATH=/opt/quire/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/home/quire \
    XDG_CACHE_HOME=/var/cache/quire \
    HF_HOME=/var/cache/quire/huggingface \
    TRITON_CACHE_DIR=/var/cache/quire/triton \
    QUIRE_HOST=0.0.0.0 \
    QUIRE_PORT=8000
USER quire
WORKDIR /home/quire
VOLUME /var/cache/quire
EXPOSE 8000
# Loading a model may take minutes; failures count only after the start period.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-I", "/usr/local/lib/quire/healthcheck.py"]
ENTRYPOINT ["tini", "--", "quire"]
CMD ["serve"]


FROM runtime AS cuda
# For the NVIDIA container toolkit, where GPUs are not handed over by `--gpus`.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=environment-cuda /opt/quire /opt/quire


FROM runtime AS cpu
COPY --from=environment-cpu /opt/quire /opt/quire
