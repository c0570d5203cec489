"""Which processes train together: options, torchrun, SLURM."""

import pytest
import torch

from kelp.config import TrainConfig
from kelp.errors import ConfigError
from kelp.nn.training.tracking import quiet_libraries

with quiet_libraries():
    from kelp.nn.training.processes import Processes, find_processes

CPU = torch.device("cpu")


def config(**changes):
    return TrainConfig(data_dir="d", metadata_fp="t", output_dir="o", **changes)


def torchrun(monkeypatch, **variables):
    names = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": 1, "RANK": 1, "WORLD_SIZE": 2}
    for name, value in (names | variables).items():
        monkeypatch.setenv(name, str(value))


def srun(monkeypatch, **variables):
    names = {
        "NTASKS": 4,
        "NTASKS_PER_NODE": 2,
        "STEP_ID": 0,
        "PROCID": 3,
        "LOCALID": 1,
        "NODEID": 1,
        "JOB_NAME": "train",
        "NNODES": 2,
    }
    for name, value in (names | variables).items():
        if value is not None:
            monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_alone_by_default():
    for changes in ({}, {"devices": "auto"}):
        assert find_processes(config(**changes), CPU) == Processes()
    assert find_processes(config(strategy="ddp"), CPU).ddp
    assert find_processes(config(devices=3), CPU).must_launch


def test_torchrun_tells_the_rank(monkeypatch):
    torchrun(monkeypatch)
    found = find_processes(config(devices=2), CPU)
    assert (found.rank, found.world_size, found.is_first, found.must_launch) == (1, 2, False, False)
    for changes in ({}, {"devices": 3}, {"devices": 2, "num_nodes": 2}):
        with pytest.raises(ConfigError, match="torchrun has started 2 processes"):
            find_processes(config(**changes), CPU)
    with pytest.raises(ConfigError, match="cv_split all: torchrun"):
        find_processes(config(devices=2, cv_split="all"), CPU)


def test_srun_tells_the_rank(monkeypatch):
    srun(monkeypatch)
    found = find_processes(config(devices=2, num_nodes=2), CPU)
    assert (found.rank, found.world_size, found.launcher.local_rank()) == (3, 4, 1)
    with pytest.raises(ConfigError, match="srun has started 4 processes"):
        find_processes(config(devices=4, num_nodes=2), CPU)
    assert find_processes(config(), CPU) == Processes()  # not asked for


def test_srun_without_tasks_per_node(monkeypatch):
    srun(monkeypatch, NTASKS_PER_NODE=None)
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        find_processes(config(devices=2, num_nodes=2), CPU)


def test_a_batch_script_without_srun_starts_them_itself(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert find_processes(config(devices=2), CPU).must_launch


def test_several_machines_need_a_launcher():
    with pytest.raises(ConfigError, match=r"num_nodes=2: .*torchrun or srun"):
        find_processes(config(num_nodes=2), CPU)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert find_processes(config(devices="auto"), cuda).world_size == 2
    with pytest.raises(ConfigError, match="devices=3: torch sees 2 GPUs"):
        find_processes(config(devices=3), cuda)


def test_auto_is_recorded_as_a_number(monkeypatch):
    from kelp.nn.training.plan import effective

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert effective(config(devices="auto")).devices == 3
    assert effective(config(devices="auto", device="cpu")).devices == 1


def test_a_run_has_a_process_at_least():
    with pytest.raises(ConfigError, match="devices"):
        config(devices=0)
