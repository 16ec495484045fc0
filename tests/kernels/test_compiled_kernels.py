"""Every kernel compiles for GPUs with little and with much shared memory. Compiling needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def compiled(tmp_path, *options: str) -> list[dict]:
    """The rows of benchmarks/targets.py, which fails if a kernel spills registers or needs too much shared memory."""
    command = [sys.executable, ROOT / "benchmarks" / "targets.py", *options, "--json", tmp_path / "table.json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "table.json").read_text())


def test_every_kernel_compiles_without_spills(tmp_path):
    """At the 7B's shapes: registers and shared memory suffice, and products use the matrix units."""
    cases = "attention, causal, 608", "token 640", "add and norm, 608", "RoPE", "SiLU", "1 row, 4096 to 22016"
    rows = compiled(tmp_path, "--targets", "86", "90", "--dtypes", "bfloat16", "--cases", *cases)
    names = ["attention_kernel", "decode_kernel", "join_kernel", "rms_norm_kernel", "rope_kernel", "swiglu_kernel"]
    for sm in (86, 90):
        assert {row["kernel"] for row in rows if row["sm"] == sm} == {*names, "int8_kernel"}
    for row in rows:
        assert row["spilled bytes"] == 0 and 0 < row["registers"] <= 255
        if row["kernel"] in ("attention_kernel", "decode_kernel"):
            many_queries = row["kernel"] == "attention_kernel"
            assert row["matrix unit"] == ("wgmma" if row["sm"] == 90 and many_queries else "mma.sync"), row


def test_the_widest_heads_fit_in_float32(tmp_path):
    rows = compiled(tmp_path, "--targets", "86", "--dtypes", "float32", "--cases", "heads of 256")
    assert [row["kernel"] for row in rows] == ["attention_kernel", "decode_kernel", "join_kernel"]
    assert all(row["shared bytes"] <= 99 * 1024 for row in rows)
