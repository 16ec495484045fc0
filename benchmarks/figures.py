"""The arithmetic of the benchmarks: errors, floors, medians, tables and bars. Nothing here runs on a device."""

import statistics

import torch
from torch import Tensor

WORST = 1.5  # times the error of the plain computation in the same dtype
FLOOR = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # an error that rounding alone causes
GROUPS = {  # the kernels of a decode step, by a part of their name
    "attention": ("decode_kernel", "join_kernel"),
    "norms and residuals": ("rms_norm_kernel",),
    "RoPE and cache": ("rope_kernel",),
    "SwiGLU": ("swiglu_kernel",),
    "matrices": ("int8_kernel", "gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "dot_kernel", "reduce_1block"),
}


# --- Errors ----------------------------------------------------------------------------------------------------------


def error(ours: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The largest error of a row of `ours` (..., D), in units of the error that is allowed: above 1 it is wrong.

    A row's error is its distance from `exact`, computed in float32, relative to the row's length. Allowed is WORST
    times the largest error of a row of `plain`, computed in the dtype of `ours`. By row, because a few wrong rows do
    not show in the error of a whole tensor.
    """
    if ours.shape != exact.shape or not ours.isfinite().all():
        return float("inf")
    length = exact.norm(dim=-1).clamp(min=1e-20)
    far, allowed = (float(((x.float() - exact).norm(dim=-1) / length).max()) for x in (ours, plain))
    return far / (WORST * max(allowed, FLOOR[ours.dtype]))


# --- Times and floors ------------------------------------------------------------------------------------------------


def turns(names, i: int) -> list:
    """The names, starting with a different one every round."""
    names = list(names)
    return names[i % len(names) :] + names[: i % len(names)]


def bytes_per_token(model: torch.nn.Module, context: int) -> int:
    """The bytes read to decode a token: the decoder, the head, and the keys and values of the context."""
    parts = {id(p): p.nbytes for part in (model.language_model, model.lm_head) for p in part.parameters()}
    if not model.config.tie_word_embeddings:  # only one row of the table is read
        del parts[id(model.language_model.embed_tokens.weight)]
    text = model.config.text_config
    keys_and_values = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    return sum(parts.values()) + context * keys_and_values


def flops_of_prompt(model: torch.nn.Module, tokens: int) -> float:
    """Multiplications and additions of the first token: every matrix for every row, and attention."""
    text, vision = model.config.text_config, model.config.vision_config
    size = lambda part: sum(p.numel() for p in part.parameters() if p.dim() == 2)  # noqa: E731
    P, depth = vision.num_patches, vision.num_hidden_layers - 1  # the last layer of the tower does not run
    tower = depth * (2 * (P + 1) * size(model.vision_tower.encoder.layers[0]) + 4 * (P + 1) ** 2 * vision.hidden_size)
    decoder = 2 * tokens * size(model.language_model.layers) + 2 * size(model.lm_head)
    attention = 2 * tokens**2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    return tower + 2 * P * size(model.multi_modal_projector) + decoder + attention


def data_sheet_speed(memory_clock_khz: int | None, bus_bits: int | None) -> float | None:
    """Bytes per second from the clock and the width of the memory bus, with two transfers per cycle."""
    return 2 * memory_clock_khz * 1000 * bus_bits / 8 if memory_clock_khz and bus_bits else None


def summary(seconds: dict[int, list[float]]) -> dict[str, float]:
    """Figures of one way to run a model, from the times of whole answers of 1, `few` and `many` tokens.

    `first`: seconds to the first token. `steady`: seconds for each token after `few`, when kernels are compiled and the
    graph is recorded. `whole`: seconds for each token of the answer of `many`, with all that happens before.
    """
    one, few, many = sorted(seconds)
    if one != 1:
        raise ValueError(f"the shortest answer must be one token, not {one}")
    first, early, whole = (statistics.median(seconds[n]) for n in (one, few, many))
    return {"first": first, "steady": (whole - early) / (many - few), "whole": whole / many}


def model_rows(found: dict[str, dict], rival: str | None, first: float, step: float) -> list[dict]:
    """A row for each way to run the model. `first` and `step`: the least seconds of the first token and of a step."""
    rows = []
    for what, figures in found.items():
        row = {"what": what, "first token, ms": f"{figures['first'] * 1e3:.1f}",
               "times its floor": f"{figures['first'] / first:.2f}",
               "steady, tokens/s": f"{1 / figures['steady']:.1f}",
               "of the reading speed": f"{step / figures['steady']:.0%}",
               "whole answer, tokens/s": f"{1 / figures['whole']:.1f}"}  # fmt: skip
        for part in ("steady", "whole") if rival else ():
            row[f"{rival} / this, {part}"] = f"{found[rival][part] / figures[part]:.2f}"
        rows.append(row)
    return rows


# --- The parts of a step ---------------------------------------------------------------------------------------------


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other")


def parts_of_a_step(kernels: list[tuple[str, float]], steps: int, step: float) -> list[dict]:
    """Where the time of a step goes: a row with a bar for each group of kernels, and for the gaps between them.

    `kernels`: name and seconds of every kernel that ran in `steps` steps; `step`: the seconds of one, not profiled.
    """
    if not kernels:
        raise ValueError("the profiler saw no kernel")
    times, counts = {}, {}
    for name, seconds in kernels:
        group = group_of(name)
        times[group] = times.get(group, 0) + seconds / steps
        counts[group] = counts.get(group, 0) + 1
    times = dict(sorted(times.items(), key=lambda item: -item[1]))
    times["between kernels"] = max(0.0, step - sum(times.values()))
    total = max(step, sum(times.values()))
    return [{"part of a step": group, "kernels": f"{counts[group] / steps:.0f}" if group in counts else "",
             "us": f"{seconds * 1e6:.0f}", "share": f"{seconds / total:.0%}",
             "": "█" * round(40 * seconds / total)} for group, seconds in times.items()]  # fmt: skip


# --- The card's own report -------------------------------------------------------------------------------------------

QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def watched(lines: list[str]) -> str:
    """One sentence about nvidia-smi's lines, which have a number for each name in QUERY."""
    rows = []
    for line in lines:
        try:
            rows.append([float(cell) for cell in line.split(",")])
        except ValueError:  # a line cut short, or "[N/A]"
            continue
    rows = [row for row in rows if len(row) == len(QUERY)]
    if not rows:
        return "Clocks and power: nvidia-smi reported none."
    parts = []
    for name, unit, values in zip(QUERY, ("MHz", "MHz", "W", "C"), zip(*rows, strict=True), strict=True):
        parts.append(f"{name} {min(values):.0f} / {statistics.median(values):.0f} / {max(values):.0f} {unit}")
    return f"Lowest / median / highest: {', '.join(parts)}."


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row.values())) + " |" for row in rows])
