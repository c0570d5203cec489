"""Fixtures for the tests of several laws. Torch is slow to load: only when one is asked for."""

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """Law 5 is about a fixed number of threads, and the other tests are too small for more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ramp(monkeypatch):
    from laws import use_ramp_network

    use_ramp_network(monkeypatch)
