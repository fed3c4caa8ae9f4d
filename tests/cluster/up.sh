#!/usr/bin/env bash
# Real sshd hosts and a real Slurm cluster on one Linux machine, up and whole. Needs root.
#
#   up.sh                    brings everything up and repairs it: dead daemons, cut links, partitions, nodes that
#                            are down or drained. Twice in a row changes nothing.
#   up.sh boot HOST...       starts hosts that are off ("down.sh off HOST"); does not wait for them
#   up.sh exec HOST CMD...   runs CMD as root inside HOST, without its sshd or the network
#   up.sh install            installs the Debian packages that are missing; starts no daemon
#   up.sh -h | --help        this text
# Removing all of it: down.sh
#
# Hosts: head (slurmctld), n1..nN (slurmd), priv (no Slurm; reachable only by a jump through n1). Each is a
# network + UTS + IPC + PID + mount namespace with its own address, hostname, PID 1, /run, /dev/shm and sshd.
# $HOME of the test user `dyn` (but for the hosts of PRIVATE_HOME), /tmp and the rest of the disk are shared.
#   . $DYNCTL_CLUSTER_DIR/env       sets SLURM_CONF, DYNCTL_SSH_CONFIG, DYNCTL_CLUSTER_DIR
#   ssh -F $DYNCTL_SSH_CONFIG head timeout 20 srun -N4 hostname
#
# Environment (a cluster that exists keeps its settings; the variables then have to agree with it):
#   DYNCTL_CLUSTER_DIR            state: keys, configuration, logs. Default: the running cluster's, else
#                                 /tmp/dynctl-cluster. Absolute, at most 60 characters, not under /run or
#                                 /dev/shm (each host has its own), enterable by the test user.
#   DYNCTL_CLUSTER_NODES          Slurm nodes, 1 to 38 (4)
#   DYNCTL_CLUSTER_NET            first two octets of the two networks (10.77)
#   DYNCTL_CLUSTER_PRIVATE_HOME   hosts with a $HOME of their own, e.g. "priv n4" (priv)
# One cluster per machine: bridges dynbr0 and dynbr1, links dyv-*, namespaces dyn-*, user dyn.

set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
umask 022
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd /
die() { echo "up.sh: $*" >&2; exit 1; }
case ${1:-} in
  ''|boot|exec|install) ;;
  -h|--help) sed -n '2,/^$/s/^# \{0,1\}//p' "$here/up.sh"; exit 0 ;;
  *) die "unknown argument '$1' (see --help)" ;;
esac
root() { [ "$(id -u)" = 0 ] || die "needs root"; }
bridge=dynbr0 private_bridge=dynbr1 user=dyn user_id=5177

# ------------------------------------------------------------------------------------------------ packages
packages=(iproute2 nftables procps openssh-server openssh-client munge slurmctld slurmd slurm-client python3-venv)
if [ "${1:-}" = install ]; then
  missing=()
  for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
  done
  [ ${#missing[@]} -gt 0 ] || exit 0
  root
  if [ ! -e /usr/sbin/policy-rc.d ]; then  # Keeps the packages from starting their daemons.
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq -o DPkg::Lock::Timeout=180 update
  apt-get -qq -o DPkg::Lock::Timeout=180 install -y --no-install-recommends --no-upgrade "${missing[@]}" >/dev/null
  exit 0
fi
root
for c in ip nft pgrep sshd ssh-keygen munged slurmctld slurmd sbatch; do
  command -v "$c" >/dev/null || die "no '$c' here; run: $here/up.sh install"
done

# --------------------------------------------------------------------------------------- settings and state
# The state directory of the cluster that is up. Not from /sys, which may show another network namespace.
owner=$(ip link show $bridge 2>/dev/null | sed -n 's/^ *alias //p') || true
D=${DYNCTL_CLUSTER_DIR:-${owner:-/tmp/dynctl-cluster}}
[[ $D =~ ^/[A-Za-z0-9._/+-]{1,59}$ ]] || die "state directory '$D': absolute, plain characters, 60 at most"
case $D/ in /run/*|/var/run/*|/dev/*) die "state directory '$D': /run and /dev/shm are private to each host" ;; esac
[ -z "$owner" ] || [ "$owner" = "$D" ] || die "a cluster is up with DYNCTL_CLUSTER_DIR=$owner"
if [ -e "$D" ] || [ -L "$D" ]; then
  { [ -d "$D" ] && [ ! -L "$D" ] && [ -O "$D" ]; } || die "$D is not a directory of this user"
  [ -e "$D/.dynctl-cluster" ] || [ -z "$(ls -A "$D")" ] || die "$D is not empty and not a cluster's state directory"
fi
NODES=4 NETPFX=10.77 PRIVATE_HOME=priv
old=
if [ -s "$D/vars" ]; then
  old=$(cat "$D/vars")
  # shellcheck source=/dev/null
  . "$D/vars"
fi
NODES=${DYNCTL_CLUSTER_NODES:-$NODES} NETPFX=${DYNCTL_CLUSTER_NET:-$NETPFX}
PRIVATE_HOME=${DYNCTL_CLUSTER_PRIVATE_HOME-$PRIVATE_HOME}
[[ $NODES =~ ^[0-9]+$ && $NODES -ge 1 && $NODES -le 38 ]] || die "DYNCTL_CLUSTER_NODES=$NODES: 1 to 38"
[[ $NETPFX =~ ^[0-9]{1,3}\.[0-9]{1,3}$ ]] || die "DYNCTL_CLUSTER_NET=$NETPFX: two octets, as in 10.77"
[[ $PRIVATE_HOME =~ ^[a-z0-9\ ]*$ ]] || die "DYNCTL_CLUSTER_PRIVATE_HOME=$PRIVATE_HOME: host names"
new=$(printf 'NODES=%s\nNETPFX=%s\nPRIVATE_HOME="%s"\n' "$NODES" "$NETPFX" "$PRIVATE_HOME")
NET=$NETPFX.0 PRIVATE_NET=$NETPFX.1
declare -A IP=([head]=$NET.10 [priv]=$PRIVATE_NET.50)
slurm_nodes=()
for ((i = 1; i <= NODES; i++)); do
  IP[n$i]=$NET.$((10 + i))
  slurm_nodes+=("n$i")
done
hosts=(head "${slurm_nodes[@]}" priv)
known() { [ -n "${IP[$1]:-}" ] || die "no host '$1' (hosts: ${hosts[*]})"; }
recorded() { cat "$D/hosts/$1/pid" 2>/dev/null || true; }  # The process whose child is the host's PID 1.
alive() {
  local p
  p=$(recorded "$1")
  [ -n "$p" ] && grep -qsaF "dynhost-$1" "/proc/$p/cmdline"
}

if [ "${1:-}" = exec ]; then
  [ $# -ge 3 ] || die "usage: up.sh exec HOST CMD..."
  known "$2"
  alive "$2" || die "$2 is off"
  p=$(pgrep -o -P "$(recorded "$2")")
  shift 2
  export SLURM_CONF=$D/slurm/slurm.conf
  exec nsenter -t "$p" --all -- "$@"
fi

exec 9</run
flock -w 120 9 || die "another up.sh or down.sh is running"  # No daemon below may inherit it: 9>&-

# -------------------------------------------------------------------------------------------- booting a host
mac() {
  local a b c d
  IFS=. read -r a b c d <<<"$1"
  printf '02:00:%02x:%02x:%02x:%02x' "$a" "$b" "$c" "$d"
}
leg() {  # HOST, interface in it, interface outside, bridge, address
  ip link show "$3" >/dev/null 2>&1 || ip link add "$3" type veth peer name "$2" netns "dyn-$1"
  # Peers keep the ARP entry of a rebooted host: with a new MAC they could not reach it for a minute.
  ip -n "dyn-$1" link set "$2" address "$(mac "$5")"
  ip link set "$3" master "$4" up
  ip -n "dyn-$1" addr replace "$5/24" dev "$2"
  ip -n "dyn-$1" link set "$2" up
}
boot() {
  local h=$1 role=node home=shared
  case $h in head) role="head" ;; priv) role=ssh ;; esac
  case " $PRIVATE_HOME " in *" $h "*) home=private ;; esac
  alive "$h" && return 0
  [ -e "/run/netns/dyn-$h" ] || ip netns add "dyn-$h"
  if [ "$h" = priv ]; then
    leg priv eth0 dyv-priv $private_bridge "${IP[priv]}"
  else
    leg "$h" eth0 "dyv-$h" $bridge "${IP[$h]}"
  fi
  if [ "$h" = n1 ]; then leg n1 eth1 dyv-n1p $private_bridge "$PRIVATE_NET.11"; fi
  setsid env -i PATH="$PATH" LC_ALL="$LC_ALL" ip netns exec "dyn-$h" \
    unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc \
    bash "$D/hosts/init.sh" "dynhost-$h" "$h" "$role" "$D" "$home" \
    </dev/null >"$D/log/init.$h.log" 2>&1 9>&- &
  echo $! >"$D/hosts/$h/pid"
  disown
}
if [ "${1:-}" = boot ]; then
  [ -n "$old" ] || die "no cluster in $D"
  shift
  for h in "$@"; do known "$h"; done
  for h in "$@"; do boot "$h"; done
  exit 0
fi
if [ -z "$owner" ]; then
  for h in "${hosts[@]}"; do
    alive "$h" && die "$D is that of a cluster in another network namespace: set DYNCTL_CLUSTER_DIR"
  done
fi
if [ -n "$old" ] && [ "$old" != "$new" ]; then
  for h in "${hosts[@]}"; do
    alive "$h" && die "the cluster is up with other settings (down.sh first): $(tr '\n' ' ' <<<"$old")"
  done
fi

# ------------------------------------------------------------------------------- user, directories, keys
mkdir -p "$D"
: >"$D/.dynctl-cluster"
chmod 755 "$D"
echo "$new" >"$D/vars"
if id $user >/dev/null 2>&1; then
  [ "$(id -u $user)" = $user_id ] || die "user $user exists with another uid than $user_id"
else
  useradd -m -u $user_id -s /bin/bash -p '*' $user  # '*': no password, yet to sshd not locked.
  : >"$D/.made-user"
fi
setpriv --reuid=$user --regid=$user --clear-groups test -x "$D" ||
  die "user $user cannot reach $D (mode of a parent directory)"
mkdir -p "$D"/{ssh,hosts,log,munge,slurm/state,slurm/spool,slurm/dev}
chown slurm "$D/slurm/state" "$D/log"
[ -f "$D/ssh/id" ] || ssh-keygen -q -t ed25519 -N '' -C dynctl-test -f "$D/ssh/id"
chown $user "$D/ssh/id"
chmod 600 "$D/ssh/id"  # Root can use it too: ssh looks at the mode only for the owner.
cp "$D/ssh/id.pub" "$D/ssh/authorized_keys"
for h in "${hosts[@]}"; do
  mkdir -p "$D/hosts/$h/local" "$D/hosts/$h/home"
  chmod 1777 "$D/hosts/$h/local"
  chown $user "$D/hosts/$h/home"
  [ -f "$D/hosts/$h/hostkey" ] || ssh-keygen -q -t ed25519 -N '' -C "$h" -f "$D/hosts/$h/hostkey"
done
for h in "${hosts[@]}"; do
  echo "$h,${IP[$h]} $(cut -d' ' -f1,2 "$D/hosts/$h/hostkey.pub")"
done >"$D/ssh/known_hosts"
{
  for h in "${hosts[@]}"; do
    printf 'Host %s\n  HostName %s\n' "$h" "${IP[$h]}"
    if [ "$h" = priv ]; then echo "  ProxyJump n1"; fi
  done
  cat <<X
Host *
  User $user
  IdentityFile $D/ssh/id
  IdentitiesOnly yes
  UserKnownHostsFile $D/ssh/known_hosts
  StrictHostKeyChecking yes
  ServerAliveInterval 5
  ServerAliveCountMax 3
X
} >"$D/ssh/config"
{
  echo "127.0.0.1 localhost"
  for h in "${hosts[@]}"; do echo "${IP[$h]} $h"; done
} >"$D/hosts/etc_hosts"
cp "$here/host_init.sh" "$D/hosts/init.sh.new"
mv "$D/hosts/init.sh.new" "$D/hosts/init.sh"  # A bash that runs it keeps the old file.

# ------------------------------------------------------------------- network; heals what a test left behind
for b in $bridge $private_bridge; do
  ip link show "$b" >/dev/null 2>&1 || ip link add "$b" type bridge
  ip link set "$b" alias "$D"
  ip link set "$b" up
done
ip addr replace "$NET.1/24" dev $bridge
# Else a connect to the private net leaves by the default gateway, and may even be accepted there.
ip route replace unreachable "$PRIVATE_NET.0/24"
# Where br_netfilter is on, bridged frames pass iptables, and Docker sets the policy of FORWARD to DROP.
if [ "$(cat /proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null)" = 1 ] && command -v iptables >/dev/null; then
  for b in $bridge $private_bridge; do
    iptables -C FORWARD -i "$b" -o "$b" -j ACCEPT 2>/dev/null || iptables -I FORWARD -i "$b" -o "$b" -j ACCEPT
  done
fi
if nft list table bridge dyn >/dev/null 2>&1; then nft delete table bridge dyn; fi
for l in $(ip -br link | sed -n 's/^\(dyv-[a-z0-9]*\)@.*/\1/p'); do
  ip link set "$l" up
  tc qdisc del dev "$l" root 2>/dev/null || true
done

# --------------------------------------------------------------- munge: one daemon, its socket shared by all
p=$(cat "$D/munge/munged.pid" 2>/dev/null || true)
if [ -z "$p" ] || ! grep -qsaF "$D/munge" "/proc/$p/cmdline"; then
  [ -f "$D/munge/munge.key" ] || dd if=/dev/urandom of="$D/munge/munge.key" bs=128 count=1 status=none
  chown -R munge:munge "$D/munge"
  chmod 755 "$D/munge"
  chmod 400 "$D/munge/munge.key"
  rm -f "$D"/munge/munge.sock* "$D/munge/munged.pid"
  setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged --socket="$D/munge/munge.sock" \
    --key-file="$D/munge/munge.key" --pid-file="$D/munge/munged.pid" --log-file="$D/munge/munged.log" \
    --seed-file="$D/munge/seed" 9>&-
fi

# ------------------------------------------------------------- Slurm's configuration, make-believe GPUs
for i in 0 1 2 3; do
  [ -c "$D/slurm/dev/nvidia$i" ] || mknod -m 666 "$D/slurm/dev/nvidia$i" c 1 3
done
{
  sed -e "s|@DIR@|$D|g" -e "s|@HEAD@|${IP[head]}|g" "$here/slurm.conf.in"
  for n in "${slurm_nodes[@]}"; do echo "NodeName=$n NodeAddr=${IP[$n]}"; done
  all=$(IFS=,; echo "${slurm_nodes[*]}")
  echo "PartitionName=DEFAULT DefMemPerCPU=500 State=UP"
  echo "PartitionName=gpu Nodes=$all Default=YES MaxTime=INFINITE"
  echo "PartitionName=debug Nodes=$all MaxTime=5"
} >"$D/slurm/slurm.conf"
echo "Name=gpu File=$D/slurm/dev/nvidia[0-3]" >"$D/slurm/gres.conf"  # Without a File, slurmd drops them.
# slurmd wants a cgroup plugin named where /sys/fs/cgroup is hidden, as `ip netns exec` does. It is only named:
# no plugin of slurm.conf uses it.
echo "CgroupPlugin=cgroup/v1" >"$D/slurm/cgroup.conf"
echo "export DYNCTL_CLUSTER_DIR=$D SLURM_CONF=$D/slurm/slurm.conf DYNCTL_SSH_CONFIG=$D/ssh/config" >"$D/env"

# ------------------------------------------------------ boot; a host that does not answer is power-cycled
open_tcp() { timeout 5 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null; }
open_priv() {
  [ -e /run/netns/dyn-n1 ] &&
    timeout 5 ip netns exec dyn-n1 bash -c "exec 3<>/dev/tcp/${IP[priv]}/22" 2>/dev/null
}
healthy() {
  case $1 in
    priv) open_priv ;;
    head) open_tcp "${IP[head]}" 6817 && open_tcp "${IP[head]}" 22 ;;
    *) open_tcp "${IP[$1]}" 6818 && open_tcp "${IP[$1]}" 22 ;;
  esac
}
dead() {  # Three tries: the machine may be busy.
  for _ in 1 2 3; do
    healthy "$1" && return 1
    sleep .2
  done
}
until_ok() {  # SECONDS CMD...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || { echo "up.sh: gave up: $* (logs: $D/log)" >&2; return 1; }
    sleep .05
  done
}
for h in "${hosts[@]}"; do
  if alive "$h" && dead "$h"; then DYNCTL_CLUSTER_DIR=$D DYNCTL_CLUSTER_LOCKED=1 "$here/down.sh" off "$h"; fi
  boot "$h"
  # A slurmd that finds no slurmctld registers late.
  if [ "$h" = head ]; then until_ok 90 open_tcp "${IP[head]}" 6817; fi
done

# ------------------------------------------------------------------------------------- wait until usable
for h in head "${slurm_nodes[@]}"; do until_ok 30 open_tcp "${IP[$h]}" 22; done
until_ok 30 open_priv
export SLURM_CONF=$D/slurm/slurm.conf
states() { timeout 5 sinfo -h -N -p gpu -o '%N %t' 2>/dev/null || true; }  # `sinfo -t idle` lists drained nodes too.
usable() {
  [ "$(states | grep -cE ' (idle|mix|alloc)$')" -ge "$NODES" ] && return 0
  for n in $(states | awk '$2 ~ /^(drain|drng|down)/ {print $1}'); do
    timeout 5 scontrol update nodename="$n" state=resume 2>/dev/null || true
  done
  return 1
}
until_ok 60 usable
# A new slurmctld says "idle" of nodes it cannot use yet, so something is run; jobs may be in its way.
jobs=$(timeout 5 squeue -h 2>/dev/null || true)
limit=30
[ -z "$jobs" ] || limit=5
timeout 40 srun -Q "-N$NODES" --immediate=$limit -J up-check true 2>/dev/null || [ -n "$jobs" ] ||
  die "srun -N$NODES failed (logs: $D/log)"
echo "up: $NODES Slurm nodes usable; . $D/env; ssh -F \$DYNCTL_SSH_CONFIG n1"
