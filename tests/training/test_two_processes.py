"""Steps, or a whole model, divided over two processes on a CPU: the losses, weights, tokens and answers of one process.

Processes that use torch take seconds to start, so all runs of two processes are parts of one: tests/two_processes.py.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing import assert_close

import two_processes
from hub.files import BUNDLED
from llava import LlavaProcessor
from tiny_world import ROOT, TURNS, logged_losses, write_file, write_records
from training import progress, run_stage
from training.records import Records
from training.shard import SavedParts
from two_processes import BATCH, COMMANDS, ENDLESS, PARTS, STEPS, STOP, adapt, ask, train_by_command, tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records, two without a picture, and a sharded run that one process began."""
    folder = tmp_path_factory.mktemp("two")
    made, words = write_records(folder, 2), [{"conversations": [{"from": "human", "value": "Hello."}, TURNS[1]]}]
    (folder / "my.json").write_text(json.dumps(made + words * 2))
    (folder / "words.json").write_text(json.dumps(made[:1] + words * 6))
    (folder / "six").mkdir()
    write_file(folder / "six", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "REPORT_EVERY", 1)
        with alone():
            adapt(folder, "adapted", stop=STOP)
        yield folder


@contextmanager
def alone():
    """A group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ended(folder):
    """Exit code, standard output and standard error of the two processes, which end by Ctrl-C."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(PARTS)]
    ports = [str(free.getsockname()[1]) for free in sockets]
    for free in sockets:
        free.close()
    command, running = [sys.executable, ROOT / "tests" / "two_processes.py", folder, *ports], []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        own |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=os.environ | own, **pipes))
    lines = []
    for line in running[0].stdout:
        lines.append(line)
        if f"2/{ENDLESS}" in line:
            break
    for process in running:
        process.send_signal(signal.SIGINT)
    ends = [process.communicate(timeout=60) for process in running]
    codes = [process.returncode for process in running]
    return codes, ["".join(lines) + ends[0][0], ends[1][0]], [errors for _, errors in ends]


def test_ctrl_c_ends_both_without_a_traceback(ended):
    codes, _, errors = ended
    assert codes == [130, 130], errors
    assert not any("Traceback" in text for text in errors), errors


def test_only_the_first_prints(ended):
    _, (first, second), errors = ended
    assert second == "" and "saved to" in first and errors[1].count("\n") == 1, (second, errors)


def test_two_processes_learn_what_one_does(folder, ended, monkeypatch):
    """The same global batch: the same losses, and so the same gradients, in every stage."""
    monkeypatch.chdir(folder)
    train_by_command("stages", "stages by one")
    one, two = (logged_losses(folder / f"stages by {n}") for n in ("one", "two"))
    assert list(one) == list(two) and len(one) == 16
    for step, loss in one.items():
        assert float(two[step]) == pytest.approx(float(loss), abs=2e-3), (step, one, two)


def test_a_lora_of_two_processes_is_that_of_one(folder, ended, monkeypatch):
    monkeypatch.chdir(folder)
    train_by_command("lora", "lora by one")
    one, two = (load_file(folder / f"lora by {n}" / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(tensor, two[name], atol=2e-3, rtol=0, msg=name)


def test_two_processes_take_what_has_no_picture(folder, ended):
    """One of them has no picture in its share, and so no gradient for the projector."""
    assert list(logged_losses(folder / "few pictures by two")) == [("tune", step) for step in range(1, 5)]
    assert (folder / "few pictures by two" / "model.safetensors").is_file()


@pytest.mark.parametrize("name, run", [("tuned", tune), ("adapted", adapt)])
def test_a_resumed_run_of_two_learns_what_one_process_does(folder, ended, name, run):
    """One was begun by two processes, the other by one. In the last step a process has no picture in its sample."""
    records = Records(folder / "my.json", folder, LlavaProcessor.from_pretrained(BUNDLED), 2048)
    last = range((STEPS - 1) * BATCH, STEPS * BATCH)
    assert {"pixel_values" in records.conversations(range(n, n + 1)) for n in last} == {True, False}
    run(folder, f"{name}-by-one", shard=False)
    check_same(folder / f"{name}-by-one", folder / name)


def test_a_sharded_run_validates_and_recomputes_as_one_process_does(folder, ended):
    two_processes.tune_and_validate(folder, "validated-by-one", shard=False)
    rows = [("tune validation", 0), ("tune", 1), ("tune validation", 1)]
    check_same(folder / "validated-by-one", folder / "validated", rows)


def check_same(one, two, logged=tuple(("tune", step) for step in range(1, STEPS + 1))):
    """The losses of each step, and the weights after the last."""
    ours, theirs = logged_losses(two), logged_losses(one)
    assert list(ours) == list(theirs) and {step for _, step in ours} == {step for _, step in logged}
    assert len(ours) == len(logged)
    for step, loss in ours.items():
        assert float(loss) == pytest.approx(float(theirs[step]), abs=2e-4), (step, ours, theirs)
    (file,) = one.glob("*model.safetensors")
    one, two = load_file(file), load_file(two / file.name)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert_close(tensor, two[key], atol=2e-3, rtol=1e-2, msg=key)


def test_one_process_resumes_a_run_of_two(folder, ended):
    parts = folder / "tuned-then-by-one" / "tune.parts"
    assert [step.name for step in parts.iterdir()] == [f"step-{STOP}"]
    shutil.copytree(parts / f"step-{STOP}", parts / "step-3")
    (parts / "step-3" / "run.json").unlink()  # not complete: must not be read
    with alone():
        tune(folder, "tuned-then-by-one")
    check_same(folder / "tuned", folder / "tuned-then-by-one")
    assert [step.name for step in parts.iterdir()] == [f"step-{STEPS}"]


def test_a_run_that_cannot_be_resumed_is_refused(folder, ended, tmp_path):
    shutil.copytree(folder / "adapted" / "lora.parts", tmp_path / "lora.parts")
    (step,) = (tmp_path / "lora.parts").iterdir()
    state = json.loads((step / "run.json").read_text())
    saved = SimpleNamespace(file=tmp_path / "lora.pt", settings=state["settings"])
    file = next(step.glob("*.safetensors"))
    os.truncate(file, 1000)
    with pytest.raises(ValueError, match="truncated"):
        SavedParts(saved).load()
    file.unlink()
    with pytest.raises(ValueError, match="should have 2 files"):
        SavedParts(saved).load()
    saved.settings = "others"
    with pytest.raises(ValueError, match="belongs to another run"):
        SavedParts(saved).load()
    (step / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        SavedParts(saved).load()
    saved.file.touch()
    with pytest.raises(ValueError, match="without --shard"):
        SavedParts(saved).load()
    with pytest.raises(ValueError, match="with --shard"):
        run_stage.Saved.load(saved)


def made(folder) -> list[dict]:
    return [json.loads((folder / f"made-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_divided_model_with_grouped_heads_says_what_the_whole_one_says(folder, ended):
    (heads, whole, divided, sampled), other = (each["grouped"] for each in made(folder))
    assert other == [heads, whole, divided, sampled] and whole == divided != sampled
    assert 2 * heads == two_processes.grouped().config.text_config.num_key_value_heads


def test_the_commands_answer_like_one_process(folder, ended, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for codes in made(folder):
        assert codes["one answer"] == codes["a list"] == 0 and codes["too long"] == 2
    _, (printed, _), errors = ended
    assert ask(*COMMANDS["one answer"]) == 0
    assert capsys.readouterr().out in printed
    assert all("error: the prompt is" in text for text in errors)
    assert ask(*COMMANDS["a list"][:-1], "answers-of-one") == 0
    files = [(folder / name).read_text().splitlines() for name in ("answers-of-two", "answers-of-one")]
    of_two, of_one = ([json.loads(line) | {"seconds": 0} for line in lines] for lines in files)
    assert of_two == of_one and len(of_one) == 2
