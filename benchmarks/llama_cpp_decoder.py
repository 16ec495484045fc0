"""The decoder of a checkpoint in llama.cpp, for cpu.py --llama-cpp: the same shapes, random weights, and the times.

Needs llama-cpp-python, built for this processor, and gguf. Weights do not change the times, so the files hold random
ones: a real matrix would only take longer to convert. llama.cpp runs the decoder here without a vision tower.
"""

import itertools
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from llama import LlamaConfig

with suppress(ImportError):
    import gguf
    import llama_cpp

KINDS = ("BF16", "Q8_0", "Q4_0")
AVAILABLE = "llama_cpp" in globals()
SCALE = np.float16(1e-3).view(np.uint16)  # of each block of 32 weights in Q8_0 and Q4_0


def random_matrix(rows: int, width: int, kind: str, rng: np.random.Generator) -> np.ndarray:  # (rows, bytes of a row)
    """A matrix in llama.cpp's format `kind`, as bytes. A block is a scale in float16 and the numbers of 32 weights."""
    if kind == "BF16":
        weights = rng.standard_normal((rows, width), np.float32) * np.float32(0.02)
        return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    n_bytes = {"Q8_0": 32, "Q4_0": 16}[kind]
    blocks = rng.integers(0, 256, (rows, width // 32, 2 + n_bytes), np.uint8)
    blocks[..., :2] = np.array([SCALE]).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(config: LlamaConfig, kind: str, file: Path) -> None:
    """A decoder with this configuration's shapes. Norms are ones, in float32, as llama.cpp requires."""
    D, d, inner = config.hidden_size, config.head_dim, config.intermediate_size
    H, K = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=True)  # a large file, one matrix at a time
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(d)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    matrices = {"token_embd": (config.vocab_size, D), "output": (config.vocab_size, D)}
    norms = ["output_norm"]
    for i in range(config.num_hidden_layers):
        matrices |= {f"blk.{i}.attn_q": (H * d, D), f"blk.{i}.attn_k": (K * d, D), f"blk.{i}.attn_v": (K * d, D),
                     f"blk.{i}.attn_output": (D, H * d), f"blk.{i}.ffn_gate": (inner, D), f"blk.{i}.ffn_up": (inner, D),
                     f"blk.{i}.ffn_down": (D, inner)}  # fmt: skip
        norms += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    rng = np.random.default_rng(0)
    for name, shape in matrices.items():
        matrix = random_matrix(*shape, kind, rng)
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def time_answers(
    config: LlamaConfig, kind: str, prompt_tokens: int, new_tokens: int, rounds: int, threads: int
) -> list[tuple[float, float]]:
    """For each round, seconds for the prompt, and median seconds for each of the tokens after it."""
    times = []
    with tempfile.TemporaryDirectory() as scratch:
        write(config, kind, file := Path(scratch) / "decoder.gguf")
        options = {"n_ctx": 2048, "n_batch": 1024, "n_ubatch": 1024, "verbose": False}
        llama = llama_cpp.Llama(str(file), n_threads=threads, n_threads_batch=threads, **options)
        for _ in range(rounds):
            llama.reset()
            clock = [time.perf_counter()]
            llama.eval([1] * prompt_tokens)
            for _ in range(new_tokens):
                clock.append(time.perf_counter())
                llama.eval([2])
            clock.append(time.perf_counter())
            times.append((clock[1] - clock[0], statistics.median(b - a for a, b in itertools.pairwise(clock[1:]))))
        llama.close()
    return times
