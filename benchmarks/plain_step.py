"""
The plain reference step: the mathematics of the bundle's training step, written in the obvious way.

`benchmarks/speed.py` compares the bundle with it, and `tests/benchmarks/test_plain_step.py` compares losses and
gradients. SAM is upstream's `segment_anything` as published, with adapters around its modules: it attends to padded
tokens, decodes one image at a time, and sends all rows through one graph. Students are torch modules in torch's default
layout, and every loss is its formula. Do not optimize this file.

Equations: Huang et al., IEEE TMI 2025, arXiv:2412.13742.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam_monai.teachers import build_sam

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UPCONV = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
CHANNELS = (16, 32, 64, 128, 256)
DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)

# --- students ---------------------------------------------------------------------------------------------------------


def conv_norm(dims: int, num_in: int, num_out: int, kernel: int = 3, slope: float = 0.01, dropout: float = 0.0):
    """Conv-BatchNorm-Dropout-LeakyReLU."""
    convolution = CONV[dims](num_in, num_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, NORM[dims](num_out), nn.Dropout(dropout), nn.LeakyReLU(slope))


def conv_relu(dims: int, num_in: int, num_out: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [CONV[dims](num_out if i else num_in, num_out, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self, dims: int, num_classes: int, channels: Sequence[int] = CHANNELS, dropout=DROPOUT) -> None:
        super().__init__()
        pairs = list(zip(channels[:0:-1], channels[-2::-1]))
        self.pool = MAX_POOL[dims](2)
        self.encoder = nn.ModuleList(
            nn.Sequential(conv_norm(dims, num_in, num_out, dropout=p), conv_norm(dims, num_out, num_out))
            for num_in, num_out, p in zip((1, *channels), channels, dropout)
        )
        self.up = nn.ModuleList(UPCONV[dims](num_in, num_out, 2, stride=2) for num_in, num_out in pairs)
        self.decoder = nn.ModuleList(
            nn.Sequential(conv_norm(dims, 2 * num_out, num_out), conv_norm(dims, num_out, num_out))
            for _, num_out in pairs
        )
        self.head = CONV[dims](channels[0], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.encoder:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        for up, block, skip in zip(self.up, self.decoder, skips[-2::-1]):
            x = block(torch.cat((skip, up(x)), dim=1))
        return self.head(x)


class VNet(nn.Module):
    def __init__(self, dims: int, num_classes: int, channels: Sequence[int] = CHANNELS, counts=(1, 2, 3, 3, 3)) -> None:
        super().__init__()
        pairs = list(zip(channels[:0:-1], channels[-2::-1]))
        self.stem = conv_relu(dims, 1, channels[0], counts[0])
        self.encoder = nn.ModuleList(
            nn.Sequential(CONV[dims](num_in, num_out, 2, stride=2), nn.ReLU(), conv_relu(dims, num_out, num_out, count))
            for num_in, num_out, count in zip(channels, channels[1:], counts[1:])
        )
        self.up = nn.ModuleList(
            nn.Sequential(UPCONV[dims](num_in, num_out, 2, stride=2), nn.ReLU()) for num_in, num_out in pairs
        )
        self.decoder = nn.ModuleList(
            conv_relu(dims, num_out, num_out, count) for (_, num_out), count in zip(pairs, counts[-2::-1])
        )
        self.head = CONV[dims](channels[0], num_classes, 1)
        for module in self.modules():  # without normalization torch's default would vanish
            if isinstance(module, (CONV[dims], UPCONV[dims])):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips: list[Tensor] = []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)
        for up, stage, skip in zip(self.up, self.decoder, skips[::-1]):
            x = stage(up(x) + skip)
        return self.head(x)


class Aggregation(nn.Module):
    """HAM, eq. 1 to 3."""

    def __init__(self, dims: int, num_classes: int, widths: Sequence[int] = (16, 16, 32)) -> None:
        super().__init__()
        for_agreement, for_entropy, for_logits = widths

        def branch(num_in: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                conv_norm(dims, num_in, width, slope=0.2), conv_norm(dims, width, width, kernel=1, slope=0.2)
            )

        self.entropy = branch(2, for_entropy)
        self.agreement = branch(num_classes, for_agreement)
        self.logits = branch(2 * num_classes, for_logits)
        self.mix = conv_norm(dims, sum(widths), sum(widths), slope=0.2)
        self.head = CONV[dims](sum(widths), num_classes, 3, padding=1, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        certainty = 1 - torch.cat((entropy_map(a), entropy_map(b)), dim=1)
        agreement = (full(a.detach()).softmax(1) > 0.5) == (full(b.detach()).softmax(1) > 0.5)
        features = (
            self.entropy(certainty), self.agreement(agreement.to(certainty)), self.logits(torch.cat((a, b), dim=1))
        )  # fmt: skip
        return self.head(self.mix(torch.cat(features, dim=1)))


class Student(nn.Module):
    """U-Net, V-Net and HAM: all three logits in train mode, HAM's in eval mode."""

    def __init__(
        self, dims: int = 2, num_classes: int = 4, channels: Sequence[int] = CHANNELS, dropout=DROPOUT
    ) -> None:
        super().__init__()
        self.unet = UNet(dims, num_classes, channels, dropout)
        self.vnet = VNet(dims, num_classes, channels)
        self.aggregation = Aggregation(dims, num_classes)

    def forward(self, image: Tensor) -> tuple[Tensor, ...] | Tensor:
        a, b = self.unet(image), self.vnet(image)
        fused = self.aggregation(a, b)
        return (fused, a, b) if self.training else fused


# --- teacher ----------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A module of SAM with an adapter (Medical SAM Adapter): on its output with a skip, or half of it beside it."""

    def __init__(self, module: nn.Module, dim: int, beside: bool) -> None:
        super().__init__()
        self.module = module
        self.adapter = nn.Sequential(nn.Linear(dim, dim // 4), nn.GELU(), nn.Linear(dim // 4, dim))
        self.beside = beside

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y = self.module(*args, **kwargs)
        return y + 0.5 * self.adapter(args[0]) if self.beside else y + self.adapter(y)


class SAM(nn.Module):
    """SAM with adapters and learnable prompts, eq. 6 and 7: logits of C classes for images (B, 1, H, W)."""

    def __init__(self, num_classes: int = 4, image_size: int = 256, variant: str = "vit_b", window=(0, 1)) -> None:
        super().__init__()
        self.sam = build_sam(variant, image_size).requires_grad_(False)
        for block in self.sam.image_encoder.blocks:
            dim = block.attn.proj.out_features
            block.attn, block.mlp = Adapted(block.attn, dim, beside=False), Adapted(block.mlp, dim, beside=True)
        transformer, dim = self.sam.mask_decoder.transformer, self.sam.prompt_encoder.embed_dim
        for layer in transformer.layers:
            for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
                setattr(layer, name, Adapted(getattr(layer, name), dim, beside=False))
            layer.mlp = Adapted(layer.mlp, dim, beside=True)
        transformer.final_attn_token_to_image = Adapted(transformer.final_attn_token_to_image, dim, beside=False)
        half = dim // 2
        self.prompt = nn.Sequential(
            *(nn.Conv2d(dim, half, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, half), nn.GELU()),
            *(nn.Conv2d(half, half, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, half), nn.GELU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(half), nn.Linear(half, dim), nn.GELU()),
            *(nn.Linear(dim, num_classes * 2 * dim), nn.Unflatten(1, (num_classes, 2, dim))),
        )
        self.image_size = (image_size, image_size)
        self.window = window  # intensities that become 0 and 1

    def forward(self, image: Tensor, prompt_logits: Tensor) -> Tensor:
        low, high = self.window
        rgb = ((image - low) / (high - low)).repeat(1, 3, 1, 1)
        if self.window != (0, 1):
            rgb = rgb.clamp(0, 1)
        if rgb.shape[2:] != self.image_size:
            rgb = F.interpolate(rgb, self.image_size, mode="bilinear")
        embeddings = self.sam.image_encoder((rgb * 255 - self.sam.pixel_mean) / self.sam.pixel_std)
        encoder = self.sam.prompt_encoder
        prompts = F.interpolate(full(prompt_logits), encoder.mask_input_size, mode="bilinear")
        masks = []
        for embedding, tokens, prompt in zip(embeddings, self.prompt(embeddings), prompts):
            _, dense = encoder(points=None, boxes=None, masks=prompt[:, None])
            mask, _ = self.sam.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=encoder.get_dense_pe(),
                sparse_prompt_embeddings=tokens,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            masks.append(mask[:, 0])
        return F.interpolate(full(torch.stack(masks)), image.shape[2:], mode="bilinear")


# --- losses -----------------------------------------------------------------------------------------------------------


def full(logits: Tensor) -> Tensor:
    """In float32, or float64 if they are; half precision otherwise under autocast."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def entropy_map(logits: Tensor) -> Tensor:
    log_probs = full(logits).log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1, keepdim=True)


def supervised_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy + Dice over the whole batch, eq. 4 and 12."""
    logits, label = full(logits), label[:, 0].long()
    probs = logits.softmax(1)
    one_hot = F.one_hot(label, logits.shape[1]).movedim(-1, 1).to(probs)
    axes = (0, *range(2, logits.ndim))
    overlap, total = (probs * one_hot).sum(axes), (probs**2 + one_hot**2).sum(axes)
    return F.cross_entropy(logits, label) + (1 - (2 * overlap + 1e-5) / (total + 1e-5)).mean()


def mutual_loss(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 5 with hard targets."""
    return F.cross_entropy(full(a), b.argmax(1)) + F.cross_entropy(full(b), a.argmax(1))


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL, eq. 9 and 10."""
    log_p, log_q = ((full(logits) / temperature).log_softmax(1) for logits in (teacher.detach(), student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()


def sam_losses(teacher: nn.Module, image: Tensor, label: Tensor, prompt: Tensor, taught: Sequence[Tensor]):
    """SAM's logits, and the sum of its own loss (eq. 8) and of the distillation of the taught views."""
    logits = teacher(image, prompt.detach())
    loss = supervised_loss(logits[: len(label)], label)
    return logits.detach(), loss + sum(distillation_loss(view, logits) for view in taught)


def ramp_up(iteration: int, max_iterations: int = 1000) -> float:
    return math.exp(-5 * (1 - iteration / max_iterations) ** 2)


# --- steps ------------------------------------------------------------------------------------------------------------


def uncertain_cells(logits: Tensor, num_cells: int) -> Tensor:
    """Eq. 11: the cells of highest entropy of a grid of 4 along each axis, (B, 1, *spatial)."""
    pool = F.adaptive_avg_pool2d if logits.ndim == 4 else F.adaptive_avg_pool3d
    cells = pool(entropy_map(logits), 4)
    chosen = cells.flatten(1).topk(num_cells).indices
    mask = torch.zeros_like(cells).flatten(1).scatter(1, chosen, 1.0).view_as(cells)
    return F.interpolate(mask, size=logits.shape[2:]) > 0


def mix(image: Tensor, label: Tensor, fused: Tensor, pseudo_logits: Tensor) -> tuple[Tensor, Tensor]:
    n = len(label)
    num_cells = 5 if image.ndim == 4 else 20
    pseudo_label = pseudo_logits[n:].argmax(1, keepdim=True).to(label.dtype)
    labeled, unlabeled = uncertain_cells(fused[:n], num_cells), uncertain_cells(fused[n:], num_cells)
    pairs = ((image[:n], image[n:]), (label, pseudo_label))
    image, label = (
        torch.cat((torch.where(unlabeled, known, other), torch.where(labeled, other, known))) for known, other in pairs
    )
    return image, label


def images_of(volume: Tensor, slices: Tensor) -> Tensor:
    """The given slices (B, k) of volumes (B, channels, H, W, D), as images (B k, channels, H, W)."""
    return torch.cat([row[..., index].movedim(-1, 0) for row, index in zip(volume, slices)])


def knowsam_loss(
    student: nn.Module,
    teacher: nn.Module,
    image: Tensor,
    label: Tensor,
    iteration: int,
    mixing: bool,
    slices: Tensor | None = None,
) -> Tensor:
    """KnowSAM, eq. 12 and 14. Labeled rows come first; of volumes SAM sees the given slices."""
    fused, a, b = student(image)
    loss = sum(supervised_loss(view[: len(label)], label) for view in (fused, a, b))
    loss = loss + ramp_up(iteration) * mutual_loss(a, b)
    loss = loss + 0.9 * (entropy_map(a).mean() + entropy_map(b).mean()) / math.log(a.shape[1])
    if slices is None:
        pseudo_logits, losses_of_sam = sam_losses(teacher, image, label, fused, (a, b))
    else:
        of_sam = [images_of(x, slices) for x in (image, label, fused, a, b)]
        pseudo_logits, losses_of_sam = fused, sam_losses(teacher, *of_sam[:3], of_sam[3:])[1]
    loss = loss + losses_of_sam
    if mixing:
        mixed_image, mixed_label = mix(image, label, fused.detach(), pseudo_logits)
        loss = loss + sum(supervised_loss(view, mixed_label) for view in student(mixed_image))
    return loss


def train_step(
    loss: Callable[[], Tensor], student: nn.Module, teacher: nn.Module | None, precision: str, device: torch.device
) -> Callable[[], None]:
    """Forward, backward, and a step of SGD and of SAM's Adam."""
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    ]
    if teacher is not None:
        optimizers.append(torch.optim.Adam([p for p in teacher.parameters() if p.requires_grad], lr=1e-4))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            value = loss()
        scaler.scale(value).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    return step
