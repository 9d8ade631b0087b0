#!/usr/bin/env bash
# An arm64 Debian under emulation. Needs root, and installs by apt what is missing.
#   arm64.sh root CACHE                    make it in CACHE, with all that the package needs
#   arm64.sh run CACHE WHEEL OURS THEIRS   install the wheel in it and run arm64.py there
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
SRC=$(cd "$HERE/../.." && pwd)
TORCH=2.8.0 # the last one for arm64 in the Python registry without CUDA
BINFMT=/proc/sys/fs/binfmt_misc
CERTS=/etc/ssl/certs/ca-certificates.crt

mirror() { { awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/*.sources; awk '/^deb /{print $2; exit}' /etc/apt/sources.list; } 2>/dev/null | head -n 1; }

emulation() {
  local missing=()
  command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
  command -v arch-test >/dev/null || missing+=(arch-test)
  if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null
  fi
  mountpoint -q $BINFMT || mount -t binfmt_misc binfmt_misc $BINFMT
  [ -e $BINFMT/qemu-aarch64 ] || cat /usr/lib/binfmt.d/qemu-aarch64.conf >$BINFMT/register
}

# Run a command in the root, with /proc, the checkout at /src and a folder at /out; the mounts end with it.
inside() {
  local root=$1 out=$2
  shift 2
  mkdir -p "$root/src" "$root/out"
  unshare --mount sh -euc 'root=$1 src=$2 out=$3; shift 3
    mount -t proc proc "$root/proc"; mount -o bind,ro "$src" "$root/src"; mount --bind "$out" "$root/out"
    exec chroot "$root" env -u PIP_FIND_LINKS PIP_CERT='$CERTS' PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 \
      PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 HOME=/tmp FLWR_HOME=/tmp/flwr \
      FLWR_TELEMETRY_ENABLED=0 "$@"' sh "$root" "$SRC" "$out" "$@"
}

root() {
  local root=$1/root pip=/opt/fedmask/bin/pip
  mkdir -p "$1/out"
  if [ ! -e "$root" ]; then # without ca-certificates: setting that up takes minutes, and the host has some
    rm -rf "$root.part"
    mmdebstrap --quiet --arch=arm64 --variant=minbase --include=python3,python3-venv --aptopt='Acquire::Languages "none"' \
      --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
      --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$root.part" "$(mirror)"
    mv "$root.part" "$root"
  fi
  mkdir -p "$root/etc/ssl/certs"
  cp -L $CERTS "$root$CERTS"
  cp -L /etc/resolv.conf "$root/etc/resolv.conf"
  if [ ! -e "$1/torch-$TORCH" ]; then
    inside "$root" "$1/out" python3 -m venv --clear /opt/fedmask
    inside "$root" "$1/out" $pip install -q --no-deps --no-compile "torch==$TORCH"
    touch "$1/torch-$TORCH"
  fi
  # As the image is made, but nothing is installed again while the requirements are the same.
  (cd "$1/out" && inside "$root" "$1/out" sh -euc 'mkdir -p /tmp/need && cd /tmp/need &&
    cp /src/pyproject.toml /src/constraints.txt . && /opt/fedmask/bin/python /src/docker/requirements.py && cp *.txt /out')
  if ! cat "$1/out/needed.txt" "$1/out/pinned.txt" | cmp -s - "$1/installed"; then
    inside "$root" "$1/out" $pip install -q --no-compile --only-binary :all: -r /out/needed.txt -c /out/pinned.txt
    cat "$1/out/needed.txt" "$1/out/pinned.txt" >"$1/installed"
  fi
}

run() {
  local root=$1/root out=$1/out
  rm -f "$out"/*.whl "$out"/*.json
  cp "$2" "$out/" && cp "$4" "$out/theirs.json"
  inside "$root" "$out" /opt/fedmask/bin/pip install -q --no-compile --no-deps --force-reinstall "/out/$(basename "$2")"
  inside "$root" "$out" /opt/fedmask/bin/python -m pip check
  inside "$root" "$out" sh -euc 'cd /tmp && exec /opt/fedmask/bin/python /src/tests/docker/arm64.py /out/ours.json /out/theirs.json'
  cp "$out/ours.json" "$3"
}

emulation
"$@"
