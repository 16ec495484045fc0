"""The recorded decode step, with a stand-in for the CUDA graph; the kernels run in Triton's interpreter."""

import contextlib
import copy
import gc
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernel_helpers import BF16, filled, make
from kernels import accelerate
from llama import KVCache

pytest.importorskip("triton")
from kernels import graph
from kernels.decoder import FastCache
from kernels.graph import GraphStep, RecordedStep

CAPACITY = 8


class StandIn:
    """Replaces torch.cuda.CUDAGraph. A replay runs the step with the host's count at the time of recording."""

    cache, interrupted = None, False

    def replay(self) -> None:
        step, length = self.cache.recorded, self.cache.length
        self.cache.length = self.length
        with self.cache.recording():
            step.scores.copy_(type(self.model).step(self.model, step.ids, step.position_ids, self.cache))
        self.cache.length = length
        if StandIn.interrupted:
            raise KeyboardInterrupt


@pytest.fixture
def models(monkeypatch):
    """A model that records its steps with the stand-in, and the plain one."""
    plain = make("GQA and window", layers=1)
    fast = accelerate(copy.deepcopy(plain), "triton")
    recording = FastCache.recording

    def remember(cache):
        StandIn.cache = cache
        return recording(cache)

    def record(made: StandIn, **options):
        made.model, made.cache, made.length = fast, StandIn.cache, StandIn.cache.length
        return contextlib.nullcontext()

    monkeypatch.setattr(FastCache, "recording", remember)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(StandIn, "interrupted", False)
    monkeypatch.setattr(graph, "on_gpu", lambda x: True)
    return fast, plain


def start(model, mask=((1, 1, 1), (0, 1, 1))) -> KVCache:
    """A cache after a prompt."""
    cache, mask = model.language_model.new_cache(2, CAPACITY), torch.tensor(mask)
    model(torch.tensor([[1, 5, 9], [0, 1, 7]]), attention_mask=mask, past_key_values=cache)
    return cache


def step(model, cache, i: int = 0) -> Tensor:
    """The scores after a token that depends on the cache's length and on `i`."""
    ids, length = torch.tensor([10 + i, 30 - i]) + cache.length, cache.length
    return model.step(ids, torch.tensor([[length], [length - 1]]), cache).clone()


def test_a_replayed_step_is_a_step(models):
    for _ in range(2):  # a second answer records its own graph
        ours, theirs = map(start, models)
        for i in range(4):
            assert_close(step(models[0], ours), step(models[1], theirs), atol=1e-4, rtol=1e-4)
            assert ours.length == theirs.length and (ours.recorded.graph is not None) == (i > 0)
        assert_close(filled(ours), filled(theirs), atol=2e-5, rtol=2e-5)


def test_two_answers_in_turns_do_not_mix(models):
    pairs = [list(map(start, models)) for _ in range(2)]
    for _ in range(3):
        for i, (ours, theirs) in enumerate(pairs):
            assert_close(step(models[0], ours, i), step(models[1], theirs, i), atol=1e-4, rtol=1e-4)


def test_a_step_interrupted_after_its_replay_can_be_repeated(models):
    ours, theirs = map(start, models)
    for i in range(4):
        if i == 2:
            StandIn.interrupted = True
            with pytest.raises(KeyboardInterrupt):
                step(models[0], ours, 7)
            StandIn.interrupted = False
        assert_close(step(models[0], ours), step(models[1], theirs), atol=1e-4, rtol=1e-4)
        assert ours.length == theirs.length


def test_an_interrupt_while_recording_comes_after_it(models, monkeypatch):
    """Of PyTorch's capture too, which the signal would otherwise end halfway."""
    ended = []

    @contextlib.contextmanager
    def record(made, **options):
        made.model, made.cache, made.length = models[0], StandIn.cache, StandIn.cache.length
        if not ended:
            signal.raise_signal(signal.SIGINT)
        yield
        ended.append(True)

    monkeypatch.setattr(torch.cuda, "graph", record)
    ours, theirs = map(start, models)
    assert_close(step(models[0], ours), step(models[1], theirs), atol=1e-4, rtol=1e-4)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            step(models[0], ours, 7)
        assert ended and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    for _ in range(2):
        assert_close(step(models[0], ours), step(models[1], theirs), atol=1e-4, rtol=1e-4)
        assert ours.length == theirs.length


def test_a_rewound_cache_continues_from_there(models):
    cache = start(models[0])
    scores = [step(models[0], cache) for _ in range(3)]
    cache.length -= 2
    assert torch.equal(torch.stack(scores[1:]), torch.stack([step(models[0], cache) for _ in range(2)]))


def test_threads_record_one_after_the_other(models, monkeypatch):
    """PyTorch records on one stream, and a recording must not prevent other threads from allocating memory."""
    recording, modes = threading.Lock(), []

    @contextlib.contextmanager
    def record(made, capture_error_mode="global"):
        modes.append(capture_error_mode)
        assert recording.acquire(blocking=False)
        time.sleep(0.05)
        yield
        recording.release()

    monkeypatch.setattr(torch.cuda, "graph", record)
    cache, step = start(models[0]), GraphStep(models[0])
    step.plain_step = lambda *_: None  # Triton's interpreter runs in one thread only
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: step.record(RecordedStep(torch.zeros(2), torch.zeros(2, 1), 0), cache), range(3)))
    assert modes == ["thread_local"] * 3


def test_a_step_that_cannot_be_recorded_runs_normally(models, monkeypatch):
    tries = []

    @contextlib.contextmanager
    def record(made, **options):
        tries.append(gc.isenabled())
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", record)
    ours, theirs = map(start, models)
    for _ in range(4):
        assert_close(step(models[0], ours), step(models[1], theirs), atol=1e-4, rtol=1e-4)
        assert ours.length == theirs.length
    assert tries == [False] and gc.isenabled()


def test_a_graph_is_recorded_again_when_the_weights_move(models):
    ours, theirs = map(start, models)
    for move in (None, None, "to", None, None):
        if move:
            models[0].float()
        assert_close(step(models[0], ours), step(models[1], theirs), atol=1e-4, rtol=1e-4)
        assert (ours.recorded.graph is None) == (ours.length in (4, 6))


def test_what_a_graph_cannot_replay_is_not_recorded(models, monkeypatch):
    holes = start(models[0], mask=((1, 0, 1), (0, 1, 1)))
    cache = start(models[0])
    for _ in range(2):
        step(models[0], holes)
        with torch.autocast("cpu", BF16):
            step(models[0], cache)
    monkeypatch.setattr(graph, "on_gpu", lambda x: False)
    step(models[0], cache)
    assert holes.recorded is None and cache.recorded is None and cache.length == 6


def test_a_full_cache_is_not_replayed(models):
    cache = start(models[0])
    for _ in range(CAPACITY - cache.length):
        step(models[0], cache)
    with pytest.raises(ValueError, match="room for 8 tokens, and 9"):
        step(models[0], cache)
    assert cache.length == CAPACITY


@pytest.mark.quick
def test_a_decode_step_waits_for_no_value():
    """On the meta device tensors have no values, so code that reads one fails here, as it would in a graph."""
    model = accelerate(make(), "triton").to("meta")
    ids = torch.zeros(2, dtype=torch.long, device="meta")
    assert model.step(ids, ids[:, None], model.language_model.new_cache(2, 20)).shape == (2, 70)
