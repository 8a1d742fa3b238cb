"""Cache of a frozen image encoder's embeddings: each image is encoded once; kept in memory or in a folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from knowsam_monai.errors import KnowSAMPermissionError, KnowSAMValueError
from knowsam_monai.files import expand_path, write_text, write_whole

logger = logging.getLogger(__name__)

DTYPES = {torch.float16: "float16", torch.float32: "float32"}
OWNER = "cache.json"  # records which encoder a folder's embeddings belong to
LOOKUPS_WITHOUT_A_HIT = 2000  # after so many, a transform probably changes the images each time


class EmbeddingCache:
    """Look up embeddings by image content, and encode missing ones.

    The key is a hash of the image and the encoder. A flipped or rotated image has its own entry, so all embeddings are
    exact. Images are encoded one at a time, without gradient and without autocast, so an entry does not depend on the
    batch. In-place changes of the encoder's weights change the keys, except through ``.data``, which torch does not
    record: build a new cache after those. The cache pays off if images repeat, such as slices in eight orientations.
    With random intensities no image repeats and the cache only grows; a warning says so.

    Args:
        encoder: the frozen encoder; its parameters and buffers are hashed.
        facts: what else the embedding depends on (variant, image size), as plain JSON values.
        shape: (D, h, w) of an embedding.
        folder: where to store the embeddings, one file per image. Later runs and concurrent processes can share it. It
            is created if it is missing. None keeps the embeddings in memory.
        dtype: torch.float16 (half the space, relative error of at most 2^-11) or torch.float32 (exact).

    Attributes:
        num_lookups: number of images asked for so far.
        num_encoded: number of images encoded so far.
        encoding_seconds: time that this took.
        num_repeats: number of images still to be encoded although they are known, to time it.

    Shape:
        - image: (B, 3, H, W)
        - output: (B, D, h, w), on the image's device, in the precision of the encoder's weights

    Raises:
        ValueError: if `dtype` is unsupported, if the folder belongs to another encoder, size or precision, or if an
            embedding is not finite in this precision. A damaged file causes a warning and is computed again.
        PermissionError: if `folder` cannot be created, or is a file.

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
        self.folder = None if folder is None else Path(expand_path(folder, "cache_dir"))
        self.dtype = dtype
        self._record = np.dtype([("key", "S40"), ("checksum", "<u4"), ("embedding", DTYPES[dtype], self.shape)])
        self._entries: dict[str, torch.Tensor] = {}
        self._versions: tuple[tuple[int, int], ...] = ()
        self._encoder_hash = ""
        self.num_lookups = self.num_encoded = self.num_repeats = 0
        self.encoding_seconds = 0.0
        self._update_encoder_hash()

    def __len__(self) -> int:
        """Number of stored embeddings."""
        return len(self._entries) if self.folder is None else len(list(self.folder.glob("*.npy")))

    def __call__(self, image: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        self._update_encoder_hash()
        pixels = image.detach().cpu()
        rows = [self._embedding(pixels[i], image[i, None], encode) for i in range(len(image))]
        with torch.autocast("cpu", enabled=False):  # that of bfloat16 cannot stack float16
            return torch.stack(rows).to(image.device, next(self.encoder.parameters()).dtype)

    @torch.no_grad()
    def _embedding(
        self, pixels: torch.Tensor, image: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        key = self._key(pixels)
        kept = self._entries.get(key) if self.folder is None else self._read(key)
        if kept is not None and self.num_repeats > 0:
            self.num_repeats, kept = self.num_repeats - 1, None
        self.num_lookups += 1
        self.num_encoded += kept is None
        if self.num_lookups == self.num_encoded == LOOKUPS_WITHOUT_A_HIT:
            logger.warning(
                "None of the first %d images of the cached encoder repeated: look for a random transform before "
                "RandOrientationd, or set the encoder to 'adapted'.",
                self.num_lookups,
            )
        if kept is None:
            start = time.perf_counter()
            with torch.autocast(image.device.type, enabled=False):
                kept = encode(image)[0].to("cpu", self.dtype).contiguous()
            self.encoding_seconds += time.perf_counter() - start
            if not kept.isfinite().all():
                raise KnowSAMValueError(
                    f"`dtype` of the cache must hold the encoder's values but one is not finite in {self.dtype}; "
                    "use torch.float32, or look for NaN in the checkpoint."
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

    def _update_encoder_hash(self) -> None:
        """Hash the encoder again if it may have changed: in-place changes increment a tensor's version."""
        versions = tuple((x.data_ptr(), x._version) for x in (*self.encoder.parameters(), *self.encoder.buffers()))
        if versions == self._versions:
            return
        content = hashlib.blake2b(json.dumps(self.facts, sort_keys=True).encode(), digest_size=20)
        for name, value in self.encoder.state_dict().items():
            content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            content.update(_bytes(value.detach().cpu()))
        if content.hexdigest() != self._encoder_hash:
            if self.folder is not None:
                self._claim_folder(self.folder, content.hexdigest())
            self._encoder_hash = content.hexdigest()
            self._entries.clear()
        self._versions = versions

    def _claim_folder(self, folder: Path, encoder_hash: str) -> None:
        """Record the folder's encoder; refuse a folder of another one."""
        facts = {**self.facts, "encoder": encoder_hash, "shape": self.shape, "dtype": DTYPES[self.dtype]}
        facts = json.loads(json.dumps(facts))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KnowSAMPermissionError(
                f"`cache_dir` must be a writable folder but {folder} cannot be created ({error.strerror}); name "
                "another."
            ) from error
        try:
            found = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = {} if any(folder.glob("*.npy")) else None
        except ValueError:
            found = {}
        if found is None:
            write_text(folder / OWNER, json.dumps(facts, indent=1))
        elif found != facts:
            found = found if isinstance(found, dict) else {}
            other = next((name for name in facts if name in found and found[name] != facts[name]), None)
            reason = f"has no readable {OWNER}"
            if other is not None:
                reason = f"has those of {other} {found[other]} instead of {facts[other]}"
            raise KnowSAMValueError(
                f"`cache_dir` must hold the embeddings of this encoder but {folder} {reason}; name another folder, or "
                "delete this one."
            )

    def _read(self, key: str) -> torch.Tensor | None:
        """The embedding of an intact file, else None; code in a file is never run."""
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
        logger.warning("%s is damaged or belongs to another image: its embedding is computed again.", path)
        return None

    def _write(self, key: str, embedding: torch.Tensor) -> None:
        record = np.zeros(1, self._record)
        record["key"], record["embedding"] = key.encode(), embedding.numpy()
        record["checksum"] = zlib.crc32(embedding.numpy())
        path = self.folder / f"{key}.npy"
        # without sync: the checksum reveals a truncated file
        write_whole(path, lambda file: np.save(file, record, allow_pickle=False), sync=False)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
