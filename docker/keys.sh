#!/bin/sh
# Make what is missing of the keys of compose.tls.yaml, each on the volume of the one that uses it.
# FEDMASK_NAMES: names and addresses by which devices reach the SuperLink, besides its own in the stack.
set -eu
[ -e /keys/ca/ca.crt ] || fedmask keys ca --out /keys/ca
cp /keys/ca/ca.crt /keys/public/ca.crt
if [ ! -e /keys/server/server.crt ]; then
  set -- --name superlink --name superlink-control --name localhost --name 127.0.0.1
  for name in ${FEDMASK_NAMES:-}; do set -- "$@" --name "$name"; done
  fedmask keys server --ca /keys/ca --out /keys/server "$@"
fi
for node in node0 node1 node2; do
  [ -e "/keys/$node/$node.key" ] || fedmask keys node --out "/keys/$node" --name "$node"
  cp "/keys/$node/$node.pub" /keys/public/
done
