"""Faults of GPUs, of RDMA devices and of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynctl.doctor import devices
from dynctl.doctor.subject import Wanted
from dynctl.protocol.hosts import GpuProcess, IbFacts
from tests.unit.host_samples import HOME, HOSTS, VERSION, gpu, levels, loaded, only, subject, wanted


@pytest.fixture
def want(tmp_path: Path) -> Wanted:
    return wanted(loaded(tmp_path))


def port(device: str, state: str = "ACTIVE") -> IbFacts:
    return IbFacts(device=device, port=1, state=state, rate="400 Gb/sec", link_layer="InfiniBand")


def test_fewer_gpus_than_the_plan_uses(want: Wanted) -> None:
    told = only(devices.gpus(subject(want, gpus=[gpu(0), gpu(1)])), "fail")
    assert "2 x NVIDIA H100" in told.message
    assert "4 are needed" in told.message
    assert "n1" in told.remedy


def test_no_gpu_where_some_are_needed(want: Wanted) -> None:
    bare = subject(want, gpus=[], gpu_devices=0, gpu_note="nvidia-smi is not on PATH")
    assert "nvidia-smi is not on PATH" in only(devices.gpus(bare), "fail").message


def test_gpus_whose_driver_does_not_answer_are_not_counted_as_none(want: Wanted) -> None:
    hung = subject(want, gpus=[], gpu_devices=4, gpu_note="nvidia-smi does not answer")
    assert "4 devices" in only(devices.gpus(hung), "unknown").message


def test_no_gpu_is_fine_where_none_is_needed(tmp_path: Path) -> None:
    cpu = wanted(loaded(tmp_path, "engine.device=cpu"))
    assert levels(devices.gpus(subject(cpu, gpus=[], gpu_devices=0))) == ["note"]
    assert devices.gpu_use(subject(cpu)) == []


def test_unlike_gpus_on_one_host(want: Wanted) -> None:
    mixed = [gpu(0), gpu(1), gpu(2), gpu(3, name="NVIDIA A100")]
    assert "NVIDIA A100 and NVIDIA H100" in only(devices.gpus(subject(want, gpus=mixed)), "warn").message


def test_a_start_file_that_hides_gpus(want: Wanted) -> None:
    told = only(devices.gpus(subject(want, env={"CUDA_VISIBLE_DEVICES": "0"})), "warn")
    assert "CUDA_VISIBLE_DEVICES=0" in told.message


def test_a_busy_gpu_names_the_process(want: Wanted) -> None:
    busy = gpu(2, used_mib=70000, processes=[GpuProcess(pid=4711, name="python3", used_mib=69990)])
    found = devices.gpu_use(subject(want, gpus=[gpu(0), gpu(1), busy, gpu(3)]))
    assert "GPU 2: 70000 of 81559 MiB in use by python3 (pid 4711)" in only(found, "fail").message
    assert only(found, "ok").message == "3 idle"


def test_a_gpu_that_is_hardly_used_is_a_warning(want: Wanted) -> None:
    shown = gpu(0, used_mib=120, processes=[GpuProcess(pid=9, name="Xorg")])
    assert levels(devices.gpu_use(subject(want, gpus=[shown]))) == ["warn", "ok"]


def test_a_busy_gpu_that_the_plan_leaves_alone_is_nobodys_trouble(tmp_path: Path) -> None:
    small = wanted(loaded(tmp_path, "roles.prefill.tensor_parallel=1", "roles.decode.tensor_parallel=1"))
    assert small.plan is not None
    used = small.plan.nodes[0].gpus
    gpus = [gpu(i, used_mib=0 if i in used else 80000) for i in range(4)]
    assert levels(devices.gpu_use(subject(small, gpus=gpus))) == ["ok"]


@pytest.mark.parametrize(
    ("limit", "level", "remedy"),
    [([65536, 65536], "fail", "limits.conf"), ([65536, -1], "fail", "ulimit -l"), ([-1, -1], "ok", "")],
)
def test_memory_that_cannot_be_pinned(want: Wanted, limit: list[int], level: Any, remedy: str) -> None:
    assert remedy in only(devices.memlock(subject(want, limits={"memlock": limit})), level).remedy


def test_little_pinned_memory_matters_only_with_rdma(want: Wanted) -> None:
    assert levels(devices.memlock(subject(want, ib=[], limits={"memlock": [65536, 65536]}))) == ["ok"]
    assert levels(devices.memlock(subject(want, limits={}))) == ["unknown"]


def test_no_rdma_device_between_hosts(want: Wanted) -> None:
    assert "TCP" in only(devices.infiniband(subject(want, ib=[])), "warn").message
    assert levels(devices.infiniband(subject(Wanted(VERSION, HOME), ib=[]))) == ["note"]


def test_an_rdma_device_that_is_down_is_named(want: Wanted) -> None:
    found = devices.infiniband(subject(want, ib=[port("mlx5_0"), port("mlx5_1", "DOWN")]))
    assert "mlx5_1:1 down" in only(found, "warn").message
    assert levels(devices.infiniband(subject(want, ib=[port("mlx5_0", "INIT")]))) == ["fail"]


def test_ucx_is_told_of_a_device_that_is_not_there(tmp_path: Path) -> None:
    want = wanted(loaded(tmp_path, "engine.env.UCX_NET_DEVICES=mlx5_0:1,mlx5_9:1"))
    told = only(devices.transfer(subject(want)), "fail")
    assert "names mlx5_9:1" in told.message
    assert "mlx5_0:1" in told.remedy


def test_ucx_may_name_an_ethernet_interface(tmp_path: Path) -> None:
    want = wanted(loaded(tmp_path, "engine.env.UCX_NET_DEVICES=eth0"))
    assert levels(devices.transfer(subject(want, interfaces={"eth0": ["10.0.0.1"]}))) == ["ok"]


def test_ucx_without_the_fast_ways(want: Wanted) -> None:
    found = devices.transfer(subject(want, env={"UCX_TLS": "tcp,sm,self"}))
    assert "leaves out RDMA" in only(found, "warn").message
    assert "leaves out the GPUs' memory" in only(found, "fail").message
    assert levels(devices.transfer(subject(want, env={"UCX_TLS": "rc,cuda_copy,cuda_ipc"}))) == ["ok"]
    assert levels(devices.transfer(subject(want, env={"UCX_TLS": "^tcp"}))) == ["ok"]


def test_without_a_recipe_neither_settings_nor_others_on_a_gpu_are_a_fault() -> None:
    general = Wanted(VERSION, HOME)
    busy = subject(general, env={"UCX_TLS": "tcp"}, gpus=[gpu(0, used_mib=70000)])
    assert levels(devices.gpu_use(busy)) == ["note"]
    assert levels(devices.transfer(busy)) == ["warn", "warn"]


def test_what_is_set_for_nccl_only(want: Wanted) -> None:
    found = devices.transfer(subject(want, env={"NCCL_IB_HCA": "mlx5"}))
    assert "says nothing to UCX" in only(found, "note").message


def test_peermem(want: Wanted) -> None:
    assert (
        "modprobe" in only(devices.peermem(subject(want, modules={"nvidia_peermem": False})), "warn").remedy
    )
    assert levels(devices.peermem(subject(want, modules={"nvidia_peermem": None}))) == ["unknown"]
    assert devices.peermem(subject(want, HOSTS[1], ib=[])) == []
