"""The processes that kelp starts beside its own: watched, and gone when it ends. No networks."""

import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from kelp.config import TrainConfig
from kelp.errors import ConfigError, InputError, ProcessError
from kelp.nn.training import helpers
from kelp.nn.training.helpers import Helpers
from kelp.nn.training.tracking import quiet_libraries

with quiet_libraries():
    from kelp.nn.training.team import Team, form_team

CPU = torch.device("cpu")
STUB = """
import json, os, sys, time
order = json.loads(sys.stdin.readline())
def say(message):
    print(json.dumps(message), flush=True)
{body}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Helpers that run a few lines instead of a network."""

    def make(body, count=2):
        (tmp_path / "stub.py").write_text(STUB.format(body=body))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(helpers, "_MODULE", "stub")
        return Helpers(config(), count, 1234, 1, Path("RUN"))

    return make


def config(**changes):
    return TrainConfig(data_dir="d", metadata_fp="t", output_dir="o", **changes)


def test_they_are_told_and_end_with_the_first(start):
    with start('assert order["count"] == 3\nsay({"ready": True})\nsys.stdin.read()', 3) as crew:
        crew.wait()
        crew.check()
        assert [helper.status for helper in crew.helpers] == [None, None]
    assert [helper.status for helper in crew.helpers] == [0, 0]


def test_one_that_does_not_end_is_ended(start, monkeypatch):
    monkeypatch.setattr(helpers, "_PATIENCE", 0.2)
    with start('say({"ready": True})\ntime.sleep(60)') as crew:
        crew.wait()
    assert crew.helpers[0].status == -signal.SIGKILL


def test_one_that_is_killed_is_named_in_one_line(start):
    with start('say({"ready": True})\ntime.sleep(60)') as crew:
        crew.wait()
        crew.helpers[0].process.kill()
        with pytest.raises(ProcessError, match=r"process 2 of 2 was killed.*resume_from RUN$"):
            crew.check(5)


def test_the_error_of_one_arrives_as_it_was(start):
    with (
        start('say({"error": "InputError", "message": "x.tif: bad"})\nsys.exit(2)') as crew,
        pytest.raises(InputError, match=r"^x\.tif: bad$"),
    ):
        crew.wait()


def test_the_cause_is_told_rather_than_its_consequence(start):
    body = """
if order["rank"] == 2:
    say({"error": "InputError", "message": "x.tif: bad"})
    sys.exit(2)
os.kill(os.getpid(), 9)"""
    with start(body, 3) as crew:
        while not all(helper.status for helper in crew.helpers):
            time.sleep(0.01)
        with pytest.raises(InputError, match="bad"):
            crew.wait()


def test_a_bug_in_one_shows_its_traceback(start):
    with start("raise ValueError(7)") as crew, pytest.raises(RuntimeError, match="ValueError: 7"):
        crew.wait()


def test_this_process_is_told_while_it_does_something_else(start, monkeypatch):
    monkeypatch.setattr(helpers, "_PATIENCE", 0.1)
    with start('say({"ready": True})\ntime.sleep(60)') as crew:
        crew.wait()
        crew.helpers[0].process.kill()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)
        with pytest.raises(ProcessError):
            crew.check()


# --- who takes part


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
        assert form_team(config(**changes), CPU) == Team()
    assert form_team(config(strategy="ddp"), CPU).ddp
    assert form_team(config(devices=3), CPU).starts


def test_torchrun_tells_the_rank(monkeypatch):
    torchrun(monkeypatch)
    team = form_team(config(devices=2), CPU)
    assert (team.rank, team.count, team.leads, team.starts) == (1, 2, False, False)
    for changes in ({}, {"devices": 3}, {"devices": 2, "num_nodes": 2}):
        with pytest.raises(ConfigError, match="torchrun has started 2 processes"):
            form_team(config(**changes), CPU)
    with pytest.raises(ConfigError, match="cv_split all: torchrun"):
        form_team(config(devices=2, cv_split="all"), CPU)


def test_srun_tells_the_rank(monkeypatch):
    srun(monkeypatch)
    team = form_team(config(devices=2, num_nodes=2), CPU)
    assert (team.rank, team.count, team.outside.local_rank()) == (3, 4, 1)
    with pytest.raises(ConfigError, match="srun has started 4 processes"):
        form_team(config(devices=4, num_nodes=2), CPU)
    assert form_team(config(), CPU) == Team()  # not asked for


def test_srun_without_tasks_per_node(monkeypatch):
    srun(monkeypatch, NTASKS_PER_NODE=None)
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        form_team(config(devices=2, num_nodes=2), CPU)


def test_a_batch_script_without_srun_starts_its_own(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert form_team(config(devices=2), CPU).starts


def test_several_machines_need_a_launcher():
    with pytest.raises(ConfigError, match=r"num_nodes=2: .*torchrun or srun"):
        form_team(config(num_nodes=2), CPU)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert form_team(config(devices="auto"), cuda).count == 2
    with pytest.raises(ConfigError, match="devices=3: torch sees 2 GPUs"):
        form_team(config(devices=3), cuda)


def test_auto_is_recorded_as_a_number(monkeypatch):
    from kelp.nn.training.plan import effective

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert effective(config(devices="auto")).devices == 3
    assert effective(config(devices="auto", device="cpu")).devices == 1


def test_the_helper_is_a_program():
    assert sys.modules[helpers.__name__]._MODULE == "kelp.nn.training.helper"
    with pytest.raises(ConfigError, match="devices"):
        config(devices=0)
