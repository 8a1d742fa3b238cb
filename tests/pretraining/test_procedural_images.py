from __future__ import annotations

import numpy as np
import pytest

from pretraining.procedural_images import draw_image


@pytest.fixture(scope="module")
def drawn():
    return [draw_image(seed=0, index=index, size=64) for index in range(40)]


def test_seed_and_index_give_the_same_pixels_and_another_index_gives_others(drawn):
    again, other = draw_image(seed=0, index=3, size=64), draw_image(seed=1, index=3, size=64)
    assert np.array_equal(drawn[3].image, again.image) and np.array_equal(drawn[3].masks, again.masks)
    assert not np.array_equal(drawn[3].image, drawn[4].image)
    assert not np.array_equal(drawn[3].image, other.image)


def test_every_image_has_masks_that_can_be_seen_and_values_from_0_to_1(drawn):
    for image, masks, kinds in drawn:
        assert len(masks) == len(kinds) > 0
        assert masks.sum(axis=(1, 2)).min() >= 8  # 0.2 % of 64 x 64
        assert image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1 and image.std() > 0


def test_pairs_and_chambers_exist_and_only_touching_pairs_have_a_union(drawn):
    seen = set()
    for _, masks, kinds in drawn:
        seen.update(kinds)
        for place, kind in enumerate(kinds):
            if kind == "whole":
                assert kinds[place - 2 : place] == ("touching", "touching")
                pair = masks[place - 2 : place]
                assert np.array_equal(masks[place], pair[0] | pair[1]) and not (pair[0] & pair[1]).any()
    assert seen == {"single", "outer", "inner", "touching", "whole", "wall", "cavity", "crescent"}
