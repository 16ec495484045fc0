"""The files that training leaves: only finite numbers, permissions by the umask, stages of the model they belong to."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from hub.files import BUNDLED
from hub.writer import save
from llava import LlavaForConditionalGeneration, LlavaProcessor
from tiny_world import ROOT, tiny_world, untrained
from training.run_stage import Place, run_stage
from training.stage_files import STAGE_FILES, load_stage, save_stage, snapshot
from training.stages import TUNE

STAGES_FOLDER = ROOT / "checkpoints" / "stages"


@pytest.mark.quick
def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    """A number may be finite in float32 only: a checkpoint is in bfloat16."""
    model, processor = untrained(), tiny_world().processor
    good = snapshot(model)
    for number, dtype in ((torch.nan, torch.float32), (torch.inf, torch.float32), (3.4e38, torch.bfloat16)):
        with torch.no_grad():
            model.float().language_model.norm.weight[3] = number
        name = r"language_model\.norm\.weight"
        with pytest.raises(ValueError, match=name):
            save(model.to(dtype), processor, tmp_path / "model")
        with pytest.raises(ValueError, match=name):
            save_stage(model.state_dict(), good, tmp_path / "stage.safetensors")
        assert not (tmp_path / "model").exists() and not (tmp_path / "stage.safetensors").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_umask_decides_who_may_read_what_is_written(tmp_path, umask):
    model, processor = untrained(), LlavaProcessor.from_pretrained(BUNDLED)
    before = os.umask(umask)
    try:
        save(model, processor, tmp_path / "whole")
        save(model, processor, tmp_path / "shards", shard_bytes=5e6)
        save_stage(model.state_dict(), {name: -t for name, t in model.state_dict().items()},
                   tmp_path / "stages" / "stage.safetensors")  # fmt: skip
        stage = replace(TUNE, steps=1, batch=1)
        run_stage(stage, model, partial(stage.data, tiny_world()), Place(tmp_path / "run"))
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in written}
    assert {"model.safetensors", "model-00001-of-00006.safetensors", "stage.safetensors", "tune.pt"} <= set(modes)
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes


def test_the_bundled_stages_are_the_models_and_those_of_another_are_refused(tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(BUNDLED, torch.float32, kernels="torch")
    final = snapshot(model)
    seen = []
    for name in STAGE_FILES.values():
        load_stage(model, final, STAGES_FOLDER, name)
        changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, final[key])}
        seen.append({key.partition(".")[0] for key in changed})
    decoder = {key for key in final if key.startswith(("language_model.", "lm_head."))}
    load_stage(model, final, STAGES_FOLDER, "before-alignment")
    assert all(not torch.equal(model.state_dict()[key], final[key]) for key in decoder)
    assert seen == [{"language_model", "lm_head", "multi_modal_projector"}] * 2 + [set()]
    one, other = {"other.weight": torch.ones(1)}, {"other.weight": torch.zeros(1)}
    save_stage(one, other, tmp_path / "before-alignment.safetensors")
    with pytest.raises(ValueError, match=r"before-alignment\.safetensors.*other\.weight"):
        load_stage(model, final, tmp_path, "before-alignment")
