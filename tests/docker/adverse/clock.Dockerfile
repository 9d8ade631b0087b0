# The image with a wall clock that CLOCK_OFF makes wrong. libfaketime would do, if Python's sleep survived it.
ARG FEDMASK_IMAGE
FROM ${FEDMASK_IMAGE} AS build
USER root
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY clock.c /
RUN gcc -O2 -Wall -Werror -shared -fPIC -o /clock.so /clock.c

FROM ${FEDMASK_IMAGE}
COPY --from=build /clock.so /usr/lib/clock.so
