"""What a step cannot show: a model learns."""

import json
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from test_stages import MODEL
from torch import Tensor

from depthkit.config import DPTConfig, OptimConfig, TeacherConfig
from depthkit.evaluation.settings import Alignment, ProtocolConfig
from depthkit.models import build_model
from depthkit.stages.teacher import TeacherModule

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")
PROTOCOL = ProtocolConfig(name="p", max_depth=80.0, alignment=Alignment.disparity_least_squares)


def real_pair(samples_dir: Any, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One NYU image with its disparity and mask, shrunk to a square."""
    samples = map(json.loads, (samples_dir / "index.jsonl").read_text().splitlines())
    sample = next(sample for sample in samples if sample["source"] == "nyu_metric3d")
    image = cv2.imread(str(samples_dir / sample["rgb"]))[..., ::-1]
    depth = cv2.imread(str(samples_dir / sample["label"]), cv2.IMREAD_UNCHANGED) / sample["scale"]
    image = cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=cv2.INTER_AREA)
    depth = torch.from_numpy(cv2.resize(depth, (size, size), interpolation=cv2.INTER_NEAREST)).float()
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, torch.where(depth > 0, 1 / depth.clamp(min=0.1), torch.nan), depth > 0


@pytest.mark.slow
def test_tiny_model_learns_one_real_image_by_heart(samples_dir):
    torch.manual_seed(0)
    image, disparity, valid_mask = real_pair(samples_dir, 64)
    larger = {**MODEL.encoder_args, "img_size": 64, "embed_dim": 64, "patch_size": 4}
    config = DPTConfig(**{**vars(MODEL), "encoder_args": larger})
    module = TeacherModule(build_model(config), TeacherConfig(), OptimConfig(encoder_lr=1e-3), PROTOCOL)
    optimizer = torch.optim.Adam(module.model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=400)
    part = {"image": image[None], "target": disparity[None], "valid_mask": valid_mask[None]}
    losses = []
    for step in range(400):
        loss = module.training_step({"labeled": part}, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])
