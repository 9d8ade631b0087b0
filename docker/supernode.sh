#!/bin/sh
# A device. Its client processes start warm where the container has memory for it: the warm one holds 180 MB.
limit=$(cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null | head -n 1)
case ${limit:-max} in
  max) ;;
  *) [ "$limit" -ge 700000000 ] || exec flower-supernode "$@" ;;
esac
exec fedmask supernode "$@"
