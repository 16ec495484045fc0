"""Every kernel compiles for sm_80 and sm_90. Compiling needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def test_every_kernel_compiles_without_spills(tmp_path):
    """At the 7B's shapes, by the benchmark's own command: registers suffice, and products use the matrix units."""
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--compile-only", "--json", tmp_path / "table.json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["compiled"]
    assert {row["sm"] for row in rows} == {80, 90}
    names = ["attention_kernel", "decode_kernel", "join_kernel", "rms_norm_kernel", "rope_kernel", "swiglu_kernel"]
    assert {row["kernel"] for row in rows} == {*names, "int8_kernel"}
    for row in rows:
        assert row["spilled bytes"] == 0, row
        assert row["shared bytes"] <= (227 if row["sm"] == 90 else 99) * 1024, row
        if row["kernel"] in ("attention_kernel", "decode_kernel") and "float32" not in row["what"]:
            many_queries = row["kernel"] == "attention_kernel"
            assert row["matrix unit"] == ("wgmma" if row["sm"] == 90 and many_queries else "mma.sync"), row
