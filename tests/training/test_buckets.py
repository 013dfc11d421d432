import math
import random

import pytest

from lora_workbench.training.buckets import (
    bucket_for,
    bucket_sizes,
    crop_box,
    enlargement,
    size_for,
    size_notes,
    sizes_for,
)

RESOLUTIONS = (64, 128, 256, 320, 512, 768, 1000, 1024, 1536)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_no_size_exceeds_the_area_or_the_sides_that_were_asked_for(resolution):
    for width, height in bucket_sizes(resolution):
        assert width * height <= resolution**2
        assert min(256, resolution // 2) <= min(width, height) and max(width, height) <= 2 * resolution
        assert width % 64 == height % 64 == 0


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_size_comes_in_both_orientations_and_there_is_a_square(resolution):
    sizes = bucket_sizes(resolution)
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert (resolution // 64 * 64,) * 2 in sizes
    assert len(set(sizes)) == len(sizes)


def test_the_sizes_sdxl_was_trained_at_are_among_those_for_1024():
    known = {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (832, 1216), (640, 1536)}
    assert known <= set(bucket_sizes(1024))


def test_a_smaller_step_gives_more_sizes():
    assert set(bucket_sizes(512)) - {(512, 512)} and len(bucket_sizes(512, step=32)) > len(bucket_sizes(512))


def test_a_resolution_below_the_step_is_refused_with_its_value():
    with pytest.raises(ValueError, match="at least 64, got 32"):
        bucket_sizes(32)


def test_the_nearest_shape_is_measured_alike_for_wide_and_tall_pictures():
    sizes = bucket_sizes(1024)
    drawn = random.Random(0)
    for _ in range(500):
        width, height = drawn.randint(1, 6000), drawn.randint(1, 6000)
        wide, tall = bucket_for(width, height, sizes), bucket_for(height, width, sizes)
        assert wide == tall[::-1]
        best = min(abs(math.log(w / h * height / width)) for w, h in sizes)
        assert abs(math.log(wide[0] / wide[1] * height / width)) == pytest.approx(best, abs=1e-8)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (30000, 3)])
def test_no_shape_is_too_odd_for_a_size(size):
    assert bucket_for(*size, bucket_sizes(512)) in bucket_sizes(512)


def test_the_crop_is_centred_has_the_shape_of_its_size_and_wastes_nothing():
    sizes = bucket_sizes(512)
    drawn = random.Random(1)
    for _ in range(500):
        width, height = drawn.randint(1, 6000), drawn.randint(1, 6000)
        bucket = bucket_for(width, height, sizes)
        left, top, right, bottom = crop_box(width, height, bucket)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert (right - left) / (bottom - top) == pytest.approx(bucket[0] / bucket[1])
        assert (left + right, top + bottom) == pytest.approx((width, height))
        assert min(left, top) == pytest.approx(0, abs=1e-6)


def test_the_crop_is_given_in_pixels_of_the_original():
    assert crop_box(400, 100, (64, 64)) == (150, 0, 250, 100)
    assert crop_box(100, 400, (64, 64)) == (0, 150, 100, 250)
    assert crop_box(128, 64, (128, 64)) == (0, 0, 128, 64)


def test_without_a_limit_a_picture_gets_its_nearest_shape_however_small_it_is():
    assert size_for(300, 300, 1024) == (1024, 1024)
    assert sizes_for(300, 300, [1024]) == ((1024, 1024),)


def test_no_picture_is_lost_or_enlarged_beyond_the_limit():
    drawn = random.Random(2)
    for _ in range(2000):
        width, height = drawn.randint(64, 4000), drawn.randint(64, 4000)
        resolution, limit = drawn.choice(RESOLUTIONS[1:]), drawn.choice((1.0, 1.25, 2.0))
        size = size_for(width, height, resolution, limit)
        assert enlargement(width, height, size) <= limit
        assert math.prod(size) <= resolution**2 and size[0] % 64 == size[1] % 64 == 0
        bucket = bucket_for(width, height, bucket_sizes(resolution))
        assert size == bucket or enlargement(width, height, bucket) > limit


def test_a_small_picture_is_trained_at_as_many_of_its_own_pixels_as_it_has():
    assert size_for(700, 500, 1024, 1.0) == (640, 448)
    assert size_for(700, 500, 1024, 1.25) == (832, 576)  # 875 x 625
    assert size_for(3000, 100, 1024, 1.0) == (2048, 64)
    assert size_for(40, 200, 512, 1.0) == (64, 192)  # nothing smaller exists


def test_a_picture_is_trained_at_every_resolution_it_is_large_enough_for():
    assert sizes_for(2000, 2000, (1024, 512, 768)) == ((512, 512), (768, 768), (1024, 1024))
    assert sizes_for(1000, 1000, (512, 768, 1024)) == ((512, 512), (768, 768), (960, 960))
    assert sizes_for(520, 520, (512, 768, 1024)) == ((512, 512),)
    assert sizes_for(520, 520, (512, 768, 1024), 2.0) == ((512, 512), (768, 768), (1024, 1024))


def test_a_picture_too_small_for_every_resolution_is_still_trained_once():
    assert sizes_for(300, 300, (512, 768)) == ((512, 512),)
    assert sizes_for(300, 300, (512, 768), 1.0) == ((256, 256),)


def test_pictures_that_are_too_small_are_listed():
    pictures = [("a.png", 2000, 2000), ("b.png", 700, 500), ("c.png", 30, 30)]
    assert size_notes(pictures, [1024]) == [
        "2 of 3 pictures are smaller than 1024 x 1024, e.g. b.png (700 x 500): they are enlarged, which can teach blur."
    ]
    assert size_notes(pictures, [1024], 1.0) == [
        "1 of 3 pictures is too small for 1024 x 1024 and trained smaller instead of enlarged: b.png at 640 x 448.",
        "1 of 3 pictures is smaller than the smallest size to train at and enlarged, which can teach blur: "
        "c.png (30 x 30, 2.1 times).",
    ]
    assert "instead of enlarged more than 1.25 times: b.png at 832 x 576" in size_notes(pictures, [1024], 1.25)[0]
    assert size_notes(pictures[:1], [1024], 1.0) == size_notes(pictures[:1], [512, 1024]) == []
    assert size_notes([(f"{n}.png", 700, 700) for n in range(12)], [1024], 1.0)[0].endswith("and 2 more.")
