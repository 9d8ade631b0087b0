#!/bin/sh
# A device. Its client processes start warm, which costs next to nothing: they share what they import. Only where even
# the import of torch hardly fits, none is kept.
limit=$(cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null | head -n 1)
case ${limit:-max} in
  max) ;;
  *) [ "$limit" -ge 300000000 ] || exec flower-supernode "$@" ;;
esac
exec fedmask supernode "$@"
