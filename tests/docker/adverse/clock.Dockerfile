ARG FEDMASK_IMAGE
FROM ${FEDMASK_IMAGE}
USER root
RUN apt-get update && apt-get install -y --no-install-recommends libfaketime && \
    ln -s /usr/lib/*/faketime/libfaketime.so.1 /usr/lib/faketime.so
USER 10001:10001
