"""Fixtures for the tests of several laws. Torch is slow to load: only when one is asked for."""

import signal

import pytest

# A background job of a shell inherits an ignored Ctrl-C, and would hand that on to the programs
# that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
