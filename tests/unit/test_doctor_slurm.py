"""A recipe's slurm section against what Slurm 22.05 printed (scontrol -o show partition, sinfo -N)."""

from __future__ import annotations

from typing import Any

import pytest

from dynctl.doctor.slurm import gpus_of, judge, judge_parts, nodes_in, partitions_in, seconds_of
from dynctl.recipe.schema import Slurm
from tests.unit.host_samples import levels, only

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A \
DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED \
MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-4] PriorityJobFactor=1 State=UP \
TotalCPUs=32 TotalNodes=4 SelectTypeParameters=NONE
PartitionName=debug AllowGroups=ALL AllowAccounts=lab,infra AllowQos=normal AllocNodes=ALL Default=NO \
QoS=N/A DefaultTime=00:05:00 MaxNodes=2 MaxTime=1-00:00:00 Nodes=n[1-4] State=UP TotalCPUs=32 TotalNodes=4
PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO DefaultTime=NONE MaxNodes=UNLIMITED \
MaxTime=UNLIMITED Nodes=n4 State=DOWN TotalNodes=1
"""
NODES = """\
n1|gpu*|idle|gpu:h100:8(S:0-1)|ib,h100
n2|gpu*|mix|gpu:h100:8(S:0-1)|ib,h100
n3|gpu*|drain|gpu:h100:8|ib
n4|gpu*|idle*|gpu:4|(null)
n1|debug|idle|gpu:h100:8(S:0-1)|ib,h100
n2|debug|mix|gpu:h100:8(S:0-1)|ib,h100
"""


def said(level: Any, **fields: Any) -> str:
    verdict = only(judge(Slurm(**fields), PARTITIONS, NODES), level)
    return f"{verdict.message} ({verdict.remedy})"


def test_a_job_that_fits() -> None:
    found = judge(Slurm(nodes=1, gpus_per_node=8), PARTITIONS, NODES)
    assert levels(found) == ["ok"]
    assert found[0].message == "2 nodes of partition gpu have 8 GPUs"


def test_a_partition_that_is_none_names_the_nearest() -> None:
    assert "did you mean debug?" in said("fail", partition="debugg")


def test_each_part_of_a_job_is_judged_by_its_own_partition_and_named() -> None:
    parts = {"prefill": Slurm(nodes=1), "decode": Slurm(partition="old")}
    found = judge_parts(parts, PARTITIONS, NODES)
    assert only(found, "fail").message == "part decode: partition old is DOWN"
    assert only(found, "ok").message == "part prefill: 2 nodes of partition gpu have what is asked"
    assert judge_parts({"": Slurm(nodes=1)}, PARTITIONS, NODES) == judge(Slurm(nodes=1), PARTITIONS, NODES)


def test_a_partition_that_is_down() -> None:
    assert "partition old is DOWN" in said("fail", partition="old")


def test_more_time_than_the_partition_gives() -> None:
    assert "1-00:00:00 at most" in said("fail", partition="debug", time=90000.0, nodes=1)


def test_no_time_where_the_default_is_minutes() -> None:
    assert "ends the service after 00:05:00" in said("warn", partition="debug", nodes=1)


def test_more_nodes_than_the_partition_gives_a_job() -> None:
    found = judge(Slurm(partition="debug", nodes=3, time=60.0), PARTITIONS, NODES)
    assert [v.message for v in found if v.level == "fail"] == [
        "partition debug gives a job 2 nodes at most, slurm.nodes is 3",
        "2 nodes of partition debug have what is asked, 3 are needed",
    ]


def test_an_account_or_qos_that_is_not_let_in() -> None:
    assert "not for account me" in said("fail", partition="debug", time=60.0, account="me")
    assert "not for qos high" in said("fail", partition="debug", time=60.0, qos="high")


def test_more_gpus_than_any_node_has() -> None:
    assert "its nodes have 8 GPUs at most" in said("fail", gpus_per_node=16)


def test_nodes_that_are_drained_or_silent_do_not_count() -> None:
    told = said("fail", nodes=3, gpus_per_node=8)
    assert "2 of the 3 nodes needed can be used: n3 drain" in told
    assert "state=resume" in told
    assert "n4 idle*" in said("fail", nodes=4)


def test_a_feature_that_no_node_has_enough_of() -> None:
    assert "feature h100" in said("fail", nodes=3, constraint="h100")
    assert "not compared" in said("unknown", constraint="h100&ib")


def test_a_job_that_will_wait_is_said() -> None:
    assert "1 of them are idle now" in said("note", nodes=2, gpus_per_node=8)


def test_a_slurm_that_tells_nothing_is_no_pass() -> None:
    assert levels(judge(Slurm(), "", NODES)) == ["unknown"]
    assert levels(judge(Slurm(), PARTITIONS, "")) == ["unknown"]
    none = PARTITIONS.replace("Default=YES", "Default=NO")
    assert "no partition is the default" in only(judge(Slurm(), none, NODES), "fail").message


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:00", 1800),
        ("02:00:00", 7200),
        ("1-00:00:00", 86400),
        ("2-12", 216000),
        ("UNLIMITED", float("inf")),
        ("?", float("inf")),
    ],
)
def test_time_limits(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("gpu:h100:8(S:0-1),shard:16", 8), ("gpu:4", 4), ("(null)", 0), ("gpu", 1), ("gpu:a:2,gpu:b:2", 4)],
)
def test_gres(gres: str, gpus: int) -> None:
    assert gpus_of(gres) == gpus


def test_what_is_printed_is_read() -> None:
    assert list(partitions_in(PARTITIONS)) == ["gpu", "debug", "old"]
    assert [node.usable for node in nodes_in(NODES)[:4]] == [True, True, False, False]
    assert nodes_in(NODES)[0].features == ("ib", "h100")
