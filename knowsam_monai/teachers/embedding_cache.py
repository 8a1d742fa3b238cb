"""Embeddings of a frozen image encoder, computed once for each image: in memory, or memory-mapped in a folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from knowsam_monai.errors import KnowSAMNotADirectoryError, KnowSAMPermissionError, KnowSAMValueError
from knowsam_monai.files import write_whole

logger = logging.getLogger(__name__)

DTYPES = {torch.float16: "float16", torch.float32: "float32"}
OWNER = "cache.json"  # says whose embeddings a folder holds
LOOKUPS_WITHOUT_A_HIT = 2000  # after which something must make new images each time


class EmbeddingCache:
    """Look embeddings up by the content of their image; encode and keep those that are not there.

    The key is a hash of the image's values and of the encoder. A flipped or turned image has other values and so its
    own entry, encoded by itself: nothing is turned after the encoder, and all is exact. Images are encoded one at a
    time, without gradient and without autocast, so an entry does not depend on the batch that made it. Weights that
    change in place make a new encoder, with other keys. Use it where images come again, as slices in eight
    orientations do: with random intensities no image is seen twice, and the cache only grows, which is warned of.

    Args:
        encoder: the frozen encoder; its values are hashed.
        facts: what else the embedding depends on (variant, image size): plain JSON values.
        shape: (D, h, w) of an embedding.
        folder: keeps the embeddings, one file an image, for later runs too, and for several processes at once; made
            where it is missing. None keeps them in memory.
        dtype: torch.float16, half the room and an error of at most 2^-11 of each value; or torch.float32, exact.

    Shape:
        - image: (B, 3, H, W)
        - output: (B, D, h, w), on the image's device, in the precision of the encoder's weights

    Raises:
        ValueError: when `dtype` is another, when the folder holds embeddings of another encoder, size or precision, or
            when an embedding is not finite in this precision. A file that is torn is warned of and computed again.
        NotADirectoryError: when `folder` is a file.
        PermissionError: when `folder` cannot be made.

    Example::

        >>> cache = EmbeddingCache(nn.Conv2d(3, 8, 4, 4), facts={}, shape=(8, 2, 2))
        >>> cache(torch.rand(2, 3, 8, 8), encode=cache.encoder).shape, len(cache)
        (torch.Size([2, 8, 2, 2]), 2)
    """

    def __init__(
        self,
        encoder: nn.Module,
        facts: dict[str, object],
        shape: Sequence[int],
        folder: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        if dtype not in DTYPES:
            raise KnowSAMValueError(f"`dtype` of the cache must be torch.float16 or torch.float32 but is {dtype}.")
        self.encoder = encoder
        self.facts = facts
        self.shape = tuple(shape)
        self.folder = None if folder is None else Path(folder)
        self.dtype = dtype
        self._record = np.dtype([("key", "S40"), ("checksum", "<u4"), ("embedding", DTYPES[dtype], self.shape)])
        self._entries: dict[str, torch.Tensor] = {}
        self._versions: tuple[tuple[int, int], ...] = ()
        self._encoder_hash = ""
        self._num_lookups = self._num_hits = 0
        self._follow_encoder()

    def __len__(self) -> int:
        """Number of embeddings that are kept for this encoder."""
        return len(self._entries) if self.folder is None else len(list(self.folder.glob("*.npy")))

    def __call__(self, image: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        self._follow_encoder()
        pixels = image.detach().cpu()
        rows = [self._embedding(pixels[i], image[i, None], encode) for i in range(len(image))]
        return torch.stack(rows).to(image.device, next(self.encoder.parameters()).dtype)

    @torch.no_grad()
    def _embedding(
        self, pixels: torch.Tensor, image: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        key = self._key(pixels)
        kept = self._entries.get(key) if self.folder is None else self._read(key)
        self._num_lookups += 1
        self._num_hits += kept is not None
        if self._num_lookups == LOOKUPS_WITHOUT_A_HIT and self._num_hits == 0:
            logger.warning(
                "Of %d images of the cached encoder none came again: look for a random transform before "
                "RandOrientationd, or take the encoder 'adapted'.",
                self._num_lookups,
            )
        if kept is None:
            with torch.autocast(image.device.type, enabled=False):
                kept = encode(image)[0].to("cpu", self.dtype).contiguous()
            if not kept.isfinite().all():
                raise KnowSAMValueError(
                    f"`dtype` of the cache must hold the encoder's values but in {self.dtype} one is not finite; take "
                    "torch.float32, or look for NaN in the checkpoint."
                )
            if self.folder is None:
                self._entries[key] = kept
            else:
                self._write(key, kept)
        return kept

    def _key(self, pixels: torch.Tensor) -> str:
        content = hashlib.blake2b(f"{self._encoder_hash} {pixels.dtype} {tuple(pixels.shape)}".encode(), digest_size=20)
        content.update(_bytes(pixels))
        return content.hexdigest()

    def _follow_encoder(self) -> None:
        """Hash the encoder's values when they may have changed: each change in place counts a tensor's version up."""
        versions = tuple((x.data_ptr(), x._version) for x in (*self.encoder.parameters(), *self.encoder.buffers()))
        if versions == self._versions:
            return
        content = hashlib.blake2b(json.dumps(self.facts, sort_keys=True).encode(), digest_size=20)
        for name, value in self.encoder.state_dict().items():
            content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            content.update(_bytes(value.detach().cpu()))
        if content.hexdigest() != self._encoder_hash:
            if self.folder is not None:
                self._own_folder(self.folder, content.hexdigest())
            self._encoder_hash = content.hexdigest()
            self._entries.clear()
        self._versions = versions

    def _own_folder(self, folder: Path, encoder_hash: str) -> None:
        """Write down whose folder this is; refuse one that is another's."""
        facts = {**self.facts, "encoder": encoder_hash, "shape": self.shape, "dtype": DTYPES[self.dtype]}
        facts = json.loads(json.dumps(facts))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise KnowSAMNotADirectoryError(
                f"`cache_dir` must be a folder but {folder} is or lies in a file."
            ) from None
        except OSError as error:
            raise KnowSAMPermissionError(
                f"`cache_dir` must be a folder that can be written but {folder} cannot ({error.strerror}); name "
                "another."
            ) from error
        try:
            found = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = {} if any(folder.glob("*.npy")) else None
        except ValueError:
            found = {}
        if found is None:
            write_whole(folder / OWNER, lambda file: file.write(json.dumps(facts, indent=1).encode()))
        elif found != facts:
            found = found if isinstance(found, dict) else {}
            other = next((name for name in facts if name in found and found[name] != facts[name]), None)
            reason = f"has no readable {OWNER}"
            if other is not None:
                reason = f"holds those of {other} {found[other]}, and this teacher's is {facts[other]}"
            raise KnowSAMValueError(
                f"`cache_dir` must hold the embeddings of this encoder but {folder} {reason}; name another folder, or "
                "delete that one."
            )

    def _read(self, key: str) -> torch.Tensor | None:
        """The embedding of a whole file, None where there is none; nothing that a file may hold is run."""
        path = self.folder / f"{key}.npy"
        try:
            record = np.lib.format.open_memmap(path, mode="r")
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError):
            record = None
        if record is not None and record.dtype == self._record and record.shape == (1,):
            embedding = np.array(record["embedding"][0])
            if record["key"][0] == key.encode() and record["checksum"][0] == zlib.crc32(embedding):
                return torch.from_numpy(embedding)
        logger.warning("%s is torn or of another image: its embedding is computed again.", path)
        return None

    def _write(self, key: str, embedding: torch.Tensor) -> None:
        record = np.zeros(1, self._record)
        record["key"], record["embedding"] = key.encode(), embedding.numpy()
        record["checksum"] = zlib.crc32(embedding.numpy())
        path = self.folder / f"{key}.npy"
        write_whole(path, lambda file: np.save(file, record, allow_pickle=False), sync=False)  # the checksum tells


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
