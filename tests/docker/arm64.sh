#!/usr/bin/env bash
# An arm64 Debian under emulation. Needs root, and installs by apt what is missing.
#   arm64.sh root CACHE                    make it in CACHE
#   arm64.sh run CACHE WHEEL OURS THEIRS   install the wheel and what it needs, and run arm64.py there
# UV says which uv. It installs from here, for the other machine: pip under emulation takes half an hour.
set -euo pipefail
SRC=$(cd "$(dirname "$0")/../.." && pwd)
TORCH=2.8.0 # the last one for arm64 in the Python registry without CUDA
BINFMT=/proc/sys/fs/binfmt_misc

mirror() { { awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/*.sources; awk '/^deb /{print $2; exit}' /etc/apt/sources.list; } 2>/dev/null | head -n 1; }

emulation() {
  local missing=()
  command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  command -v arch-test >/dev/null || missing+=(arch-test)
  if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null
  fi
  mountpoint -q $BINFMT || mount -t binfmt_misc binfmt_misc $BINFMT
  [ -e $BINFMT/qemu-aarch64 ] || cat /usr/lib/binfmt.d/qemu-aarch64.conf >$BINFMT/register
}

root() {
  emulation
  [ -e "$1/root" ] && return
  rm -rf "$1/root.part"
  mmdebstrap --quiet --arch=arm64 --variant=minbase --include=python3 --aptopt='Acquire::Languages "none"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$1/root.part" "$(mirror)"
  mv "$1/root.part" "$1/root"
}

run() {
  local root=$1/root
  rm -rf "$root/opt/fedmask" "$root/out"
  mkdir -p "$root/src" "$root/out"
  { grep -v -E '^torch(vision)?==' "$SRC/constraints.txt"; echo "torch==$TORCH"; } >"$1/pinned.txt"
  "${UV:-uv}" pip install -q --python-platform aarch64-manylinux_2_28 --python-version 3.11 --only-binary :all: \
    --target "$root/opt/fedmask" -c "$1/pinned.txt" "$2"
  cp "$4" "$root/out/theirs.json"
  # The mounts end with the shell that makes them.
  unshare --mount sh -euc 'mount -t proc proc "$1/proc"; mount -o bind,ro /sys "$1/sys"
    mount -o bind,ro "$2" "$1/src"; cd /; exec chroot "$1" \
    env HOME=/tmp FLWR_HOME=/tmp/flwr FLWR_TELEMETRY_ENABLED=0 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 \
    PYTHONPATH=/opt/fedmask python3 /src/tests/docker/arm64.py /out/ours.json /out/theirs.json' sh "$root" "$SRC"
  cp "$root/out/ours.json" "$3"
}

"$@"
