"""A few seconds of tests/fuzz/fuzz_readers.py, and what it found."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_readers


def test_mutated_data_is_read_or_reported():
    counts, findings = fuzz_readers.fuzz(4)
    assert not findings, "\n".join(finding.problem for finding in findings.values())
    assert counts.total() > 50


def test_a_compressed_archive_that_is_cut_is_reported(tmp_path):
    data = fuzz_readers.SEEDS["0.tar.gz"]()
    for length in range(1, 40):
        (tmp_path / "0.tar.gz").write_bytes(data[:length])
        assert not fuzz_readers.find_problem(tmp_path, "0.tar.gz")
