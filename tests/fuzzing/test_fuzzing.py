"""Changed files of every kind are read, or refused in one line.

`python benchmarks/fuzz.py --cases 50000` runs longer.
"""

import pytest
from fuzzing.kinds import KINDS, cases


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_read_or_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults = list(cases(kind, range(200), tmp_path))
    assert not faults, f"{len(faults)} faults, the first: {faults[0][:3000]}"
