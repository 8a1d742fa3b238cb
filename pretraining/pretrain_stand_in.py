"""
Pretrain `stand_in` as a promptable segmenter on procedural images: a stand-in teacher if SAM's weights are unavailable.

It is NOT SAM: it has 2 M parameters and has only seen drawn shapes.

    python -m pretraining.pretrain_stand_in --minutes 110 --threads 2 \
        --output knowsam_monai/teachers/weights/stand_in.pt
    python -m pretraining.pretrain_stand_in ... --resume          # continues from stand_in.pt.resume

With --minutes the learning rate depends on the elapsed time, summed over interrupted runs. With --steps it depends on
the step, and a resumed run equals an uninterrupted one bit for bit. The weights are a plain state dict. The .json file
of the same name records how they were made, and .log.jsonl contains losses and held-out IoUs.

As in SAM (Kirillov et al., arXiv:2304.02643, appendix A): focal and Dice loss in the ratio 20 : 1, mean squared error
for the IoU head; the first prompt is a point or a noisy box, the next ones are points in the error region with the last
logits as mask prompt; three masks and the smallest of their losses for a single point, one mask otherwise; AdamW (0.9,
0.999), learning rate 8e-4, weight decay 0.1. Different from SAM: the first prompt may also be a corrupted mask, because
a student's logits prompt this teacher; some prompts are wrong; a box gets one mask; one loss per mask on the image's
grid; few rounds; a cosine schedule; gradients clipped to norm 1.

With --initial it starts from weights of an earlier run; the record contains that run's record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss
from torch.utils.data import DataLoader, Dataset

from knowsam_monai.runs.cpu import keep_freed_memory
from knowsam_monai.teachers.sam import build_sam
from pretraining.procedural_images import draw_image
from pretraining.promptable_sam import decode, encode
from pretraining.prompts import NO_POINT, ON, TOP_LEFT, boxes_of, corrections, first_prompts, sample_points

logger = logging.getLogger("pretrain_stand_in")

WARM_UP = 0.03  # fraction of the run
RINGS = ("outer", "wall")  # the hardest objects: drawn twice as often
HELD_OUT_SEED = 1_000_003  # added to the seed: a different set of images


class ProceduralDataset(Dataset):
    """Image (1, H, W), `num_objects` of its masks, and another mask of the image (or an empty one) for each."""

    def __init__(self, seed: int, size: int, num_objects: int, num_images: int) -> None:
        self.seed, self.size, self.num_objects, self.num_images = seed, size, num_objects, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        drawn = draw_image(self.seed, index, self.size)
        masks = torch.from_numpy(drawn.masks)
        generator = torch.Generator().manual_seed(self.seed * 2_147_483_647 + index)
        weights = torch.tensor([2.0 if kind in RINGS else 1.0 for kind in drawn.kinds])
        chosen = weights.multinomial(self.num_objects, replacement=True, generator=generator)
        steps = 1 + torch.rand(self.num_objects, generator=generator) * (len(masks) - 1)
        others = masks[(chosen + steps.long()) % len(masks)] & ~masks[chosen]
        return torch.from_numpy(drawn.image)[None], masks[chosen], others


def promptable_loss(
    sam: nn.Module,
    image: torch.Tensor,
    masks: torch.Tensor,
    others: torch.Tensor,
    generator: torch.Generator,
    num_rounds: int,
) -> dict[str, torch.Tensor]:
    """Losses of one interactive session per object, averaged over rounds and objects.

    Args:
        sam: the network.
        image: (B, 1, H, W).
        masks: (B, M, H, W) bool.
        others: (B, M, H, W) bool, see :func:`first_prompts`.
        generator: generator of the prompts, on the CPU.
        num_rounds: number of prompts, the first one included.

    Returns:
        "loss" and its parts "mask" (20 focal + dice) and "iou".
    """
    embedding = encode(sam, image)
    masks, device = masks.flatten(0, 1), image.device
    prompts = first_prompts(masks, others.flatten(0, 1), sam.prompt_encoder.mask_input_size, generator)
    points, codes, mask_logits, has_mask = (x.to(device) for x in prompts)
    target = masks.to(device)
    ambiguous = (codes[:, 0] == ON) & ~has_mask
    mask_losses, iou_losses = [], []
    for number in range(num_rounds):
        low_logits, predicted_iou = (x.float() for x in decode(sam, embedding, points, codes, mask_logits, has_mask))
        requested = _requested_masks(ambiguous)
        prompt = requested.nonzero()[:, 0]
        logits = F.interpolate(low_logits[requested][:, None], size=image.shape[2:], mode="bilinear")  # (R, 1, H, W)
        losses = low_logits.new_full(requested.shape, torch.inf)
        losses[requested] = _mask_losses(logits, target[prompt])[:, 0]
        mask_losses.append(losses.amin(dim=1).mean())
        iou = _iou(logits > 0, target[prompt])[:, 0]
        iou_losses.append((predicted_iou[requested] - iou).square().mean())
        if number + 1 < num_rounds:
            best = predicted_iou.detach().masked_fill(~requested, -torch.inf).argmax(dim=1)
            rows = torch.arange(len(best), device=device)
            chosen = F.interpolate(low_logits[rows, best, None].detach(), size=image.shape[2:], mode="bilinear")
            click, code = corrections((chosen[:, 0] > 0).cpu(), masks, generator)
            points = torch.cat((points, click.to(device)), dim=1)
            codes = torch.cat((codes, code.to(device)), dim=1)
            mask_logits = low_logits[rows, best].detach().clamp(-32, 32)
            has_mask, ambiguous = torch.ones_like(has_mask), torch.zeros_like(ambiguous)
    mask_loss, iou_loss = torch.stack(mask_losses).mean(), torch.stack(iou_losses).mean()
    return {"loss": mask_loss + iou_loss, "mask": mask_loss, "iou": iou_loss}


def _requested_masks(ambiguous: torch.Tensor) -> torch.Tensor:
    """Which of the four masks (P, 4) a prompt requests: the first, or the others if it is ambiguous."""
    return torch.stack((~ambiguous, ambiguous, ambiguous, ambiguous), dim=1)


def _mask_losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """20 focal + dice for each mask (P, 4)."""
    target = target[:, None].expand_as(logits).float()
    focal = FocalLoss(gamma=2.0, alpha=0.25, reduction="none")(logits, target).mean(dim=(2, 3))
    dice = DiceLoss(sigmoid=True, reduction="none")(logits, target).flatten(1)
    return 20 * focal + dice


def _iou(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """IoU (P, K) of masks (P, K, H, W) with the ground truth (P, H, W)."""
    target = target[:, None]
    union = (predicted | target).sum(dim=(2, 3)).clamp(min=1)
    return (predicted & target).sum(dim=(2, 3)) / union


@torch.no_grad()
def held_out_iou(sam: nn.Module, seed: int, size: int, num_images: int, device: torch.device) -> dict[str, float]:
    """Mean IoU on images of another seed, for enlarged boxes and for points (the mask of best predicted IoU).

    Boxes are enlarged by 1.5 % of the image, the mean of those in training.
    """
    padding = 0.015 * size * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    dataset = ProceduralDataset(seed + HELD_OUT_SEED, size, num_objects=3, num_images=num_images)
    generator = torch.Generator().manual_seed(seed)
    ious: dict[str, list[torch.Tensor]] = {"box": [], "point": []}
    for image, masks, _ in DataLoader(dataset, batch_size=16):
        embedding, masks = encode(sam, image.to(device)), masks.flatten(0, 1)
        point = sample_points(masks, generator)
        prompts = {
            "box": ((boxes_of(masks) + padding).unflatten(1, (2, 2)), [TOP_LEFT, TOP_LEFT + 1]),
            "point": (torch.stack((point, torch.zeros_like(point)), dim=1), [ON, NO_POINT]),
        }
        empty = torch.zeros(len(masks), *sam.prompt_encoder.mask_input_size, device=device)
        for kind, (points, codes) in prompts.items():
            codes = torch.tensor(codes, device=device).expand(len(masks), -1)
            logits, predicted_iou = decode(
                sam, embedding, points.to(device), codes, empty, torch.zeros_like(codes[:, 0] > 0)
            )
            best = torch.zeros_like(codes[:, 0]) if kind == "box" else 1 + predicted_iou[:, 1:].argmax(dim=1)
            chosen = logits.float()[torch.arange(len(best), device=device), best, None]
            chosen = F.interpolate(chosen, size=image.shape[2:], mode="bilinear") > 0
            ious[kind].append(_iou(chosen, masks.to(device))[:, 0].cpu())
    return {kind: torch.cat(values).mean().item() for kind, values in ious.items()}


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then cosine decay to zero; `progress` goes from 0 to 1."""
    if progress < WARM_UP:
        return peak * max(progress / WARM_UP, 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * min((progress - WARM_UP) / (1 - WARM_UP), 1.0)))


def pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Train, write the weights and their record, and return the record."""
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    keep_freed_memory()
    device = torch.device(options.device)
    sam = build_sam("stand_in", options.image_size, options.initial).to(device).train()
    optimizer = torch.optim.AdamW(sam.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=0.1)
    step, seconds, resume_path = 0, 0.0, Path(f"{options.output}.resume")
    fixed = ("initial", "seed", "image_size", "batch_size", "objects", "rounds", "lr")
    settings = {name: getattr(options, name) for name in fixed}
    if options.resume and resume_path.is_file():
        saved = torch.load(resume_path, map_location=device, weights_only=True)
        if saved["settings"] != settings:
            raise ValueError(
                f"`resume` needs the options {saved['settings']} but they are {settings}; use these or start anew."
            )
        sam.load_state_dict(saved["sam"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds = saved["step"], saved["seconds"]
        logger.info("Resumed at step %d after %.1f min.", step, seconds / 60)
    elif not options.resume:
        Path(f"{options.output}.log.jsonl").unlink(missing_ok=True)

    def save() -> None:
        state = {"sam": sam.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        _save({**state, "settings": settings}, resume_path)

    dataset = ProceduralDataset(options.seed, options.image_size, options.objects, num_images=2**31)
    indices = range(step * options.batch_size, 2**31)
    loader = iter(DataLoader(dataset, options.batch_size, sampler=indices, num_workers=options.num_workers))
    last_save, started_at, before = time.monotonic(), step, seconds
    begin = time.monotonic()
    while (options.steps and step < options.steps) or (not options.steps and seconds < 60 * options.minutes):
        progress = step / options.steps if options.steps else seconds / (60 * options.minutes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.lr)
        image, masks, others = next(loader)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bf16):
            losses = promptable_loss(sam, image.to(device), masks, others, generator, 1 + step % options.rounds)
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        step, seconds = step + 1, before + time.monotonic() - begin
        if step % options.log_every == 0:
            pace = (time.monotonic() - begin) / (step - started_at)
            _log(options.output, step=step, seconds=seconds, pace=pace, **{k: v.item() for k, v in losses.items()})
        if step % options.evaluate_every == 0:
            _log(options.output, step=step, held_out=held_out_iou(sam, options.seed, options.image_size, 64, device))
        if time.monotonic() - last_save > 60 * options.save_minutes:
            save()
            last_save = time.monotonic()
        if options.stop_after and step - started_at >= options.stop_after:
            break
    save()
    if options.stop_after and step - started_at >= options.stop_after:
        return {"step": step}
    return _finish(sam, options, step, seconds, device)


def _finish(
    sam: nn.Module, options: argparse.Namespace, step: int, seconds: float, device: torch.device
) -> dict[str, Any]:
    iou = held_out_iou(sam, options.seed, options.image_size, options.held_out_images, device)
    _save({name: value.cpu() for name, value in sam.state_dict().items()}, Path(options.output))
    sources = sorted(Path(__file__).parent.glob("*.py"))
    record = {
        "what": "a stand-in for SAM, pretrained on procedural images: NOT SAM",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "sources_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
        "weights_sha256": hashlib.sha256(Path(options.output).read_bytes()).hexdigest(),
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "initial")},
        "initialized_from": options.initial and json.loads(Path(options.initial).with_suffix(".json").read_text()),
        "steps": step,
        "images": step * options.batch_size,
        "minutes": round(seconds / 60, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "torch": torch.__version__,
        "held_out_iou": iou,
    }
    Path(options.output).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    logger.info("%s", json.dumps(record))
    return record


def _save(content: dict[str, Any], path: Path) -> None:
    """Save to a temporary file first, so that an interruption leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _log(output: str, **values: Any) -> None:
    line = json.dumps(values)
    logger.info("%s", line)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{output}.log.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="output file of the weights")
    parser.add_argument("--initial", help="weights of an earlier run, with their record, to start from")
    parser.add_argument("--minutes", type=float, default=110.0, help="length of the run; ignored with --steps")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--objects", type=int, default=4, help="objects per image")
    parser.add_argument(
        "--rounds", type=int, default=3, help="most prompts per object; steps take turns with 1 to so many"
    )
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="use autocast")
    parser.add_argument("--matmul_precision", default="medium", choices=("highest", "high", "medium"))
    parser.add_argument("--num_workers", type=int, default=0, help="drawing processes; 0: the main process")
    parser.add_argument("--resume", action="store_true", help="continue from OUTPUT.resume")
    parser.add_argument("--save_minutes", type=float, default=5.0)
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--evaluate_every", type=int, default=1000)
    parser.add_argument("--held_out_images", type=int, default=256)
    parser.add_argument("--stop_after", type=int, default=0, help="stop after so many steps, to resume later")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pretrain(parse())
