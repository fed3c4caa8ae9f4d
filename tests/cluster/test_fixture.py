"""The cluster is what its tests take it for: real hosts and Slurm, faults that act and heal, nothing left."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.commands import CommandFailed, eventually, run
from tests.cluster.hosts import MACHINE

FOR_EVER = ["sleep", "1000"]


def test_every_host_is_its_own_and_is_reached_by_ssh(cluster: Cluster) -> None:
    assert cluster.names == ["head", "n1", "n2", "n3", "n4", "priv"]
    for host in cluster.names:
        assert cluster.ssh(host, "hostname; id -un").stdout.split() == [host, "dyn"]


def test_private_host_is_reached_only_through_its_jump_host(cluster: Cluster) -> None:
    assert not cluster.reaches(MACHINE, "priv")
    assert not cluster.reaches("n2", "priv")
    assert cluster.reaches("n1", "priv")


def test_user_runs_dynctl_on_every_kind_of_host(cluster: Cluster, home: Path, local_home: Path) -> None:
    for host, folder in (("head", home), ("n3", local_home), ("priv", home), (MACHINE, home)):
        assert cluster.dynctl("version", host=host, home=folder).stdout.startswith("dynctl ")
    told = cluster.ssh("n2", [cluster.python, "-m", "dynctl.cli.main", "version"])
    assert told.stdout.startswith("dynctl ")


def test_user_has_the_ssh_library_and_jumps_with_it(cluster: Cluster) -> None:
    code = (
        "import asyncio, asyncssh, os\n"
        "async def main():\n"
        "    async with asyncssh.connect('priv', config=[os.environ['DYNCTL_SSH_CONFIG']]) as there:\n"
        "        print((await there.run('hostname', check=True)).stdout)\n"
        "asyncio.run(main())"
    )
    assert cluster.run_as_user([cluster.python, "-c", code], host="n4").stdout.strip() == "priv"


def test_homes_are_shared_or_not_as_they_say(cluster: Cluster, home: Path, local_home: Path) -> None:
    for folder in (home, local_home):
        cluster.run_as_user(["mkdir", "-p", folder], host="n1")
        cluster.run_as_user(["touch", folder / "here"], host="n1")

    def sees(host: str, folder: Path) -> bool:
        done = cluster.run_as_user(["test", "-e", folder / "here"], host=host, check=False)
        return done.returncode == 0

    assert [host for host in cluster.names if sees(host, home)] == ["head", "n1", "n2", "n3", "n4"]
    assert [host for host in cluster.names if sees(host, local_home)] == ["n1"]


def test_command_without_an_end_is_killed_at_its_deadline(cluster: Cluster) -> None:
    with pytest.raises(CommandFailed, match="no end after"):
        cluster.run_as_user(FOR_EVER, host="n1", timeout=0.2)
    assert not cluster.processes()


def test_signal_reaches_the_command_itself(cluster: Cluster) -> None:
    code = "trap 'echo ended; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    for host in ("n2", MACHINE):
        with cluster.spawn_as_user(["bash", "-c", code], host=host) as spawned:
            eventually(lambda: "ready" in spawned.said(), "ready", 20)
            spawned.signal(signal.SIGTERM)
            assert spawned.wait() == 7
            assert spawned.said().split() == ["ready", "ended"]


def test_four_nodes_run_a_step_and_see_their_gpus(cluster: Cluster) -> None:
    told = cluster.srun("-N4", "--gpus-per-node=2", "sh", "-c", "echo $(hostname) $CUDA_VISIBLE_DEVICES")
    assert sorted(told.stdout.splitlines()) == [f"n{i} 0,1" for i in range(1, 5)]


def test_job_is_followed_to_its_end(cluster: Cluster, token: str) -> None:
    job = cluster.sbatch("exec sleep 1000", "-J", token, "-o", "/dev/null")
    assert cluster.await_job(job, "RUNNING") == "RUNNING"
    assert [found.name for found in cluster.squeue()] == [token]
    cluster.scancel(job)
    assert cluster.await_job(job) == "CANCELLED"


def test_cut_host_is_silent_until_healed(cluster: Cluster) -> None:
    for host, source in (("n3", "n2"), ("priv", "n1"), ("n1", MACHINE)):
        with cluster.cut(host):
            assert not cluster.reaches(source, host, within=0.5)
            assert cluster.is_up(host)
        assert cluster.reaches(source, host)


def test_power_cut_ends_all_in_the_host_and_it_boots_again(cluster: Cluster) -> None:
    with cluster.spawn_as_user(FOR_EVER, host="n3"):
        eventually(lambda: len(cluster.processes()) == 1, "it runs", 20)
        with cluster.off("n3"):
            assert not cluster.is_up("n3")
            assert not cluster.processes()
            with pytest.raises(CommandFailed, match="n3 is off"):
                cluster.exec("n3", "true")
        assert cluster.ssh("n3", "hostname").stdout.strip() == "n3"
    assert cluster.srun("-w", "n3", "hostname").stdout.strip() == "n3"


def test_partition_parts_two_hosts_and_no_others(cluster: Cluster) -> None:
    for a, b in (("n2", "n3"), ("n1", "priv")):
        with cluster.partition(a, b):
            assert not cluster.reaches(a, b, within=0.5)
            assert cluster.reaches("n4", a)
            assert cluster.reaches("head", "n3")
        assert cluster.reaches(a, b)


def test_faults_nest_and_the_last_waits_for_all(cluster: Cluster) -> None:
    with cluster.off("n1"), cluster.cut("priv"), cluster.cut("head"), cluster.drain("n2"):
        assert not cluster.reaches("n3", "head", within=0.5)
    assert cluster.reaches("n1", "priv")
    assert set(cluster.node_states().values()) == {"idle"}


def test_connection_dies_with_its_sshd_and_its_command_does_not(cluster: Cluster) -> None:
    ssh = ["ssh", "-F", str(cluster.ssh_config), "n4", "echo ready; exec sleep 1000"]
    with cluster.spawn_as_user(ssh, host="head") as client:
        eventually(lambda: "ready" in client.said(), "connected", 20)
        assert cluster.kill_sshd_sessions("n4") >= 1
        assert client.wait() == 255
    left = cluster.clean()
    assert len(left) == 1, "what the connection had started lives on"
    assert left[0].startswith("n4: ")


def test_dead_sshd_lets_nobody_in_until_healed(cluster: Cluster) -> None:
    with cluster.sshd_dead("n2"):
        assert not cluster.reaches(MACHINE, "n2")
    assert cluster.ssh("n2", "hostname").stdout.strip() == "n2"


def test_dead_slurmd_is_started_again(cluster: Cluster) -> None:
    with cluster.kill_slurmd("n2"):
        assert not cluster.reaches("head", "n2", 6818)
    assert cluster.srun("-w", "n2", "hostname").stdout.strip() == "n2"


def test_drained_node_takes_no_job_until_healed(cluster: Cluster) -> None:
    with cluster.drain("n4"):
        assert cluster.node_states()["n4"] == "drain"
        assert cluster.srun("-w", "n4", "--immediate=1", "true", check=False).returncode != 0
    assert cluster.node_states()["n4"] == "idle"


def test_slow_host_is_slow_until_healed(cluster: Cluster) -> None:
    with cluster.slow("n4", "1mbit"):
        assert "rate 1Mbit" in qdisc("n4")
        assert cluster.ssh("n4", "hostname").stdout.strip() == "n4"
    assert "tbf" not in qdisc("n4")


def qdisc(host: str) -> str:
    return run(["tc", "qdisc", "show", "dev", f"dyv-{host}"], timeout=20).stdout


@pytest.mark.parametrize("kill", [False, True])
def test_controller_that_is_down_answers_nobody_until_healed(cluster: Cluster, kill: bool) -> None:
    with cluster.slurmctld_down(kill=kill):
        assert not cluster.reaches("head", "head", 6817)
    assert cluster.squeue() == []


def test_full_disk_takes_no_byte_until_healed(cluster: Cluster, local_home: Path) -> None:
    cluster.run_as_user(["mkdir", "-p", local_home], host="n1")
    write = ["bash", "-c", f"echo x >{local_home}/file"]
    with cluster.full_disk("n1", at=local_home):
        done = cluster.run_as_user(write, host="n1", check=False)
        assert "No space left" in done.stderr
    cluster.run_as_user(write, host="n1")
    with cluster.full_disk("n2") as where:
        assert cluster.run_as_user(["ls", where], host="n2").stdout.split() == ["filler"]
    assert cluster.run_as_user(["test", "-e", where], host="n2", check=False).returncode == 1


def test_left_over_process_is_told_and_ended(cluster: Cluster) -> None:
    for host in ("n1", "priv", MACHINE):
        cluster.run_as_user(["setsid", "-f", *FOR_EVER], host=host)
    left = cluster.clean()
    assert [line.partition(":")[0] for line in left] == sorted(["n1", "priv", MACHINE])
    assert all(line.endswith("sleep 1000") for line in left)
    assert cluster.clean() == []


def test_left_over_job_is_told_and_cancelled(cluster: Cluster, token: str) -> None:
    job = cluster.sbatch("true", "-J", token, "-o", "/dev/null", "--begin=now+1hour")
    left = cluster.clean()
    assert [line for line in left if line.startswith(f"job {job} {token} PENDING")]
    assert cluster.job_state(job) == "CANCELLED"


def test_declared_process_stays_and_is_a_left_over_afterwards(cluster: Cluster, token: str) -> None:
    with cluster.lasting(token):
        cluster.run_as_user(["setsid", "-f", *FOR_EVER], host="n1", env={"DYNCTL_RUN": token})
        assert cluster.clean() == []
        assert len(cluster.processes()) == 1
    assert len(cluster.clean()) == 1


def test_failure_comes_with_what_the_daemons_said(cluster: Cluster) -> None:
    before = cluster.log_sizes()
    cluster.ssh("n2", "true")
    assert "Accepted publickey for dyn" in cluster.log_tails(before)
