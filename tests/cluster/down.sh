#!/usr/bin/env bash
# Removes the cluster that up.sh made. Needs root.
#
#   down.sh               stops everything; removes namespaces, links, route, user and state. Twice is fine.
#   down.sh off HOST...   powers hosts off: the link is cut first, so that peers see silence and no FIN or RST,
#                         then SIGKILL for everything in it. "up.sh boot HOST" brings it back.
#   down.sh -h | --help   this text
#
# Environment:
#   DYNCTL_CLUSTER_DIR         state directory; default: the running cluster's, else /tmp/dynctl-cluster
#   DYNCTL_CLUSTER_KEEP_STATE  1 = keep the state directory (logs, keys, settings) and the user

set -uo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd / || exit 1
die() { echo "down.sh: $*" >&2; exit 1; }
case ${1:-} in
  ''|off) ;;
  -h|--help) sed -n '2,/^$/s/^# \{0,1\}//p' "$here/down.sh"; exit 0 ;;
  *) die "unknown argument '$1' (see --help)" ;;
esac
[ "$(id -u)" = 0 ] || die "needs root"
bridge=dynbr0 private_bridge=dynbr1 user=dyn user_id=5177
owner=$(ip link show $bridge 2>/dev/null | sed -n 's/^ *alias //p')
D=${DYNCTL_CLUSTER_DIR:-${owner:-/tmp/dynctl-cluster}}
[ -z "$owner" ] || [ "$owner" = "$D" ] || die "the cluster that is up has DYNCTL_CLUSTER_DIR=$owner"
NETPFX=10.77
if [ -e "$D/.dynctl-cluster" ] && [ -O "$D/vars" ]; then
  # shellcheck source=/dev/null
  . "$D/vars"
fi
if [ "${DYNCTL_CLUSTER_LOCKED:-0}" != 1 ]; then  # up.sh holds the lock when it power-cycles a host.
  exec 9</run
  flock -w 120 9 || die "another up.sh or down.sh is running"
fi

running() { grep -qsa . "/proc/$1/cmdline"; }  # Not so of a zombie: its parent may reap it late.
gone() {
  for _ in $(seq 250); do
    running "$1" || return 0
    sleep .02
  done
  return 1
}
off() {
  local h=$1 p q qs l
  p=$(cat "$D/hosts/$h/pid" 2>/dev/null)
  for l in "dyv-$h" "dyv-${h}p"; do ip link set "$l" down 2>/dev/null; done
  # Only the process that was recorded, and only if it still holds that host.
  if [ -n "$p" ] && grep -qsaF "dynhost-$h" "/proc/$p/cmdline"; then
    kill -9 "$p"
    gone "$p"
  fi
  rm -f "$D/hosts/$h/pid"
  if [ -e "/run/netns/dyn-$h" ]; then
    for _ in $(seq 250); do  # Whatever is left inside this namespace, and nothing else.
      qs=$(ip netns pids "dyn-$h" 2>/dev/null)
      [ -n "$qs" ] || break
      for q in $qs; do kill -9 "$q" 2>/dev/null; done
      sleep .02
    done
    ip netns del "dyn-$h"
  fi
  for l in "dyv-$h" "dyv-${h}p"; do ip link del "$l" 2>/dev/null; done
  return 0
}

if [ "${1:-}" = off ]; then
  shift
  for h in "$@"; do [ -d "$D/hosts/$h" ] || die "no host '$h' in $D"; done
  for h in "$@"; do off "$h"; done
  exit 0
fi

for f in "$D"/hosts/*/; do [ -d "$f" ] && off "$(basename "$f")"; done
for ns in $(ip netns list 2>/dev/null | awk '$1 ~ /^dyn-(head|priv|n[0-9]+)$/ {print $1}'); do off "${ns#dyn-}"; done
if [ -s "$D/munge/munged.pid" ]; then
  p=$(cat "$D/munge/munged.pid")
  if grep -qsaF "$D/munge" "/proc/$p/cmdline"; then
    kill "$p"
    gone "$p"
  fi
fi
for b in $bridge $private_bridge; do
  if command -v iptables >/dev/null; then
    while iptables -D FORWARD -i "$b" -o "$b" -j ACCEPT 2>/dev/null; do :; done
  fi
  ip link del "$b" 2>/dev/null
done
ip route del unreachable "$NETPFX.1.0/24" 2>/dev/null
nft list table bridge dyn >/dev/null 2>&1 && nft delete table bridge dyn
if [ "${DYNCTL_CLUSTER_KEEP_STATE:-0}" != 1 ] && [ -e "$D/.dynctl-cluster" ] && [ ! -L "$D" ] && [ -O "$D" ]; then
  # A cluster in another network namespace has the same user.
  others=$(grep -lsaE 'dynhost-(head|priv|n[0-9]+)' /proc/[0-9]*/cmdline)
  if [ -z "$others" ] && [ -e "$D/.made-user" ] && [ "$(id -u $user 2>/dev/null)" = $user_id ]; then
    for _ in 1 2 3 4 5; do
      userdel -r $user 2>/dev/null
      id $user >/dev/null 2>&1 || break
      sleep .1
    done
  fi
  rm -rf --one-file-system "${D:?}"
fi
left=$(ip -br link 2>/dev/null | grep -cE '^(dyv-|dynbr)')
namespaces=$(ip netns list 2>/dev/null | grep -c '^dyn-')
echo "down: $left links, $namespaces namespaces left"
[ "$left" = 0 ] && [ "$namespaces" = 0 ]
