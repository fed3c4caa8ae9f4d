#!/usr/bin/env bash
# PID 1 of a host of the cluster; up.sh boot starts it in the host's namespaces.
# Arguments: dynhost-NAME (only there to be seen in /proc/PID/cmdline) NAME ROLE DIR HOME
H=$2 ROLE=$3 D=$4 HOMES=$5
hostname "$H"
export HOSTNAME=$H SLURM_CONF=$D/slurm/slurm.conf
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=64m tmpfs /run
mkdir -p /run/sshd /run/local
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$D/hosts/etc_hosts" /etc/hosts
echo "$H" >/run/hostname
mount --bind /run/hostname /etc/hostname
mount --bind "$D/hosts/$H/local" /run/local
[ "$HOMES" = private ] && mount --bind "$D/hosts/$H/home" "$(getent passwd dyn | cut -d: -f6)"
sysctl -qw net.ipv4.ip_forward=0  # n1 is a jump host, not a router.
ip link set lo up
# StrictModes: authorized_keys may lie below a world-writable directory. SetEnv: commands get no login shell.
cat >/run/sshd_config <<C
Port 22
HostKey $D/hosts/$H/hostkey
PidFile /run/sshd.pid
AuthorizedKeysFile $D/ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
AllowStreamLocalForwarding yes
UseDNS no
MaxStartups 100:30:300
MaxSessions 200
AcceptEnv LANG LC_* DYN_* DYNCTL_*
SetEnv SLURM_CONF=$D/slurm/slurm.conf
Subsystem sftp internal-sftp
LogLevel VERBOSE
C
/usr/sbin/sshd -D -f /run/sshd_config -E "$D/log/sshd.$H.log" &
if [ "$ROLE" = head ]; then
  slurmctld -D -i >>"$D/log/slurmctld.out" 2>&1 &
elif [ "$ROLE" = node ]; then
  mkdir -p "$D/slurm/spool/$H"
  slurmd -D -N "$H" >>"$D/log/slurmd.$H.out" 2>&1 &
fi
while :; do  # bash as PID 1 reaps orphans.
  sleep 3600 &
  wait $!
done
